"""Learned scales, the map of SmoothQuant and the diagonal inside LU and QR.

A scale is sign · exp(log|s|): a step of the optimiser multiplies it, and none can carry it through zero, where the map
would lose its inverse. Given up: a sign can never change.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.transforms.base import TRANSFORMS, Transform


class Diagonal(Transform):
    """A = diag(s), with log|s| learned and the signs fixed.

    Args:
        initial: s at the start (n,), no entry zero; parameters take its dtype.

    Raises:
        LatmixError: an entry is not finite, or zero to working precision next to the largest.
    """

    signs: Tensor

    def __init__(self, initial: Float[Tensor, " n"]) -> None:
        super().__init__(len(initial), orthogonal=False)
        magnitude = initial.detach().abs()
        if not (magnitude.isfinite().all() and magnitude.min() > torch.finfo(initial.dtype).eps * magnitude.max()):
            raise InputError(
                f"Singular start: |s| spans {float(magnitude.min()):.1e} … {float(magnitude.max()):.1e}; "
                "start from an invertible map."
            )
        self.log_scale = nn.Parameter(magnitude.log())
        self.register_buffer("signs", initial.detach().sign())

    @property
    def scale(self) -> Float[Tensor, " n"]:
        """s."""
        return self.signs * self.log_scale.exp()

    @property
    def order(self) -> int:
        return 1

    def part(self, some: slice) -> "Diagonal":
        part = Diagonal(self.signs[some])
        part.log_scale = nn.Parameter(self.log_scale[some], self.log_scale.requires_grad)
        return part

    def _linear(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def _solve(self, y: Tensor) -> Tensor:
        return y / self.scale.to(y.dtype)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self._solve(w)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.log_scale.sum()

    def singular_values(self) -> Float[Tensor, " n"]:
        return self.scale.detach().double().abs()


def build_diagonal(size: int, init: str, block: int, seed: int) -> Diagonal:
    """Learned: one scale per coordinate, from one."""
    return Diagonal(torch.ones(size))


TRANSFORMS.add("diagonal", build_diagonal)
