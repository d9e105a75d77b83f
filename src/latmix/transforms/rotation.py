"""Learned rotations: A = expm(½(G − Gᵀ)) A₀ is orthogonal for every G, so a plain optimiser may move G freely.

The exponential is written out, as a polynomial and a few squarings, for the sake of its gradient: the backward pass of
`torch.linalg.matrix_exp` exponentiates a matrix of twice the size, and for n = 1024 took eleven times the forward pass.
Given up: the Cayley map, one solve instead of some ten products, which cannot reach a half turn.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.transforms.base import TRANSFORMS, Dense, identity
from latmix.transforms.initial import initial_matrix


class Rotation(Dense):
    """A = expm(½(G − Gᵀ)) A₀ with G learned, zero at the start; A⁻¹ = Aᵀ.

    Args:
        initial: A₀, orthogonal (n, n); parameters take its dtype.

    Cost: nine n × n products for A, and one for each doubling of the angle beyond ½ (see `exponential`).

    Raises:
        LatmixError: `initial` is not square, or not orthogonal to 1e-4.
    """

    initial: Tensor

    def __init__(self, initial: Float[Tensor, "n n"]) -> None:
        super().__init__(initial, orthogonal=True)
        initial = initial.detach()
        defect = float((initial.T @ initial - identity(self.size, initial)).abs().max())
        if not defect <= 1e-4:
            raise InputError(f"Rotation starts from an orthogonal matrix, got AᵀA − I as large as {defect:.1e}.")
        self.generator = nn.Parameter(torch.zeros_like(initial))
        self.register_buffer("initial", initial.clone())

    def _dense(self) -> tuple[Tensor, Tensor]:
        matrix = exponential((self.generator - self.generator.T) / 2) @ orthonormal(self.initial)
        return matrix, matrix.T

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.generator.new_zeros(())


def exponential(s: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """expm(S) by scaling and squaring: expm(S) = p(S/2ᵏ)^(2ᵏ), to the precision of the dtype.

    p is the Taylor polynomial of degree 16, in powers of S⁴ (Paterson and Stockmeyer): six products. k makes the norm
    at most ½, where the remainder ½¹⁷/17! ≈ 2e-20 leaves room for the squarings. That norm is ‖S⁴‖₁^¼, hardly above the
    spectral norm, where ‖S‖₁ may be √n times as large (Al-Mohy and Higham, SIAM J. Matrix Anal. 31, 2009).
    """
    powers = [identity(len(s), s), s, s @ s]
    powers += [s @ powers[2], powers[2] @ powers[2]]
    _, exponent = math.frexp(float(powers[4].detach().abs().sum(dim=0).max()) ** 0.25)
    squarings = max(0, exponent + 1)
    powers = [power * 2.0 ** (-squarings * k) for k, power in enumerate(powers)]

    def terms(first: int, count: int) -> Tensor:
        return sum((powers[j] / math.factorial(first + j) for j in range(count)), start=torch.zeros_like(s))

    result = terms(12, 5)
    for first in (8, 4, 0):
        result = result @ powers[4] + terms(first, 4)
    for _ in range(squarings):
        result = result @ result
    return result


def orthonormal(q: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """One Newton step towards the nearest orthogonal matrix, which squares the defect QᵀQ − I.

    A matrix stored in float32 is orthogonal to 1e-7 only; this lets a float64 fold rely on Q⁻¹ = Qᵀ all the same.
    """
    return q + q @ (identity(len(q), q) - q.T @ q) / 2


def build_rotation(size: int, init: str, block: int, seed: int) -> Rotation:
    """Learned: a rotation, expm of a skew matrix."""
    return Rotation(initial_matrix(init, size, block, seed)).float()


TRANSFORMS.add("rotation", build_rotation)
