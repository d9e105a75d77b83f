"""Kronecker products: A = left ⊗ right, the cheap full-size map of FlatQuant (arXiv 2410.09426).

Two factors near √n mix every coordinate with every other for O(n√n) per vector, cheap enough to stay online. Given up
is expressivity: 2n freedoms stand for n².
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import InputError
from latmix.transforms.base import TRANSFORMS, Map, Transform
from latmix.transforms.initial import initial_matrix
from latmix.transforms.lu import LU


class Kronecker(Transform):
    """A = left ⊗ right: seen as a matrix X (left.size, right.size), a vector becomes A_left X A_rightᵀ.

    Raises:
        LatmixError: a factor has a shift (wrap the product in `Affine` instead).
    """

    def __init__(self, left: Transform, right: Transform) -> None:
        if left.shift is not None or right.shift is not None:
            raise InputError("Kronecker takes linear factors; put Affine around the product.")
        super().__init__(left.size * right.size, left.orthogonal and right.orthogonal)
        self.left = left
        self.right = right

    def _linear(self, x: Tensor) -> Tensor:
        return self._sides(self.left.linear, self.right.linear, x)

    def _solve(self, y: Tensor) -> Tensor:
        return self._sides(self.left.solve, self.right.solve, y)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self._sides(self.left.transposed_solve, self.right.transposed_solve, w)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.right.size * self.left.logabsdet() + self.left.size * self.right.logabsdet()

    def singular_values(self) -> Float[Tensor, " n"]:
        return torch.outer(self.left.singular_values(), self.right.singular_values()).flatten()

    def _sides(self, left: Map, right: Map, x: Tensor) -> Tensor:
        x = right(torch.unflatten(x, -1, (self.left.size, self.right.size)))
        return left(x.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def build_kronecker(size: int, init: str, block: int, seed: int) -> Kronecker:
    """Learned: the Kronecker product of two LU maps of sizes near the square root."""
    left = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    factors = [LU(initial_matrix(init, n, block, seed)).float() for n in (left, size // left)]
    return Kronecker(*factors)


TRANSFORMS.add("kronecker", build_kronecker)
