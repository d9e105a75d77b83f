"""Learned rotations: A = expm(½(G − Gᵀ)) A₀ is orthogonal for every G, so a plain optimiser may move G freely.

The exponential is written out, as a polynomial and a few squarings, for the sake of its gradient: the backward pass of
`torch.linalg.matrix_exp` exponentiates a matrix of twice the size, and for n = 1024 took eleven times the forward pass.
Given up: the Cayley map, one solve instead of some five products, which cannot reach a half turn.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.transforms.base import TRANSFORMS, identity
from latmix.transforms.dense import Dense
from latmix.transforms.initial import initial_matrix


class Rotation(Dense):
    """A = expm(½(G − Gᵀ)) A₀ with G learned, zero at the start; A⁻¹ = Aᵀ.

    Args:
        initial: A₀, orthogonal (n, n); parameters take its dtype.

    Cost: five n × n products for A in float32, and one for each doubling of the angle beyond ¼ (see `exponential`).

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

    def factors(self) -> tuple[Tensor, ...]:
        return self.generator, self.initial

    @staticmethod
    def build(*factors: Tensor) -> tuple[Tensor, Tensor]:
        generator, initial = factors
        matrix = exponential((generator - generator.mT) / 2) @ orthonormal(initial)
        return matrix, matrix.mT

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.generator.new_zeros(())


def exponential(s: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """expm(S) of skew S by scaling and squaring: expm(S) = p(S/2ᵏ)^(2ᵏ), to the precision of the dtype.

    p is the Taylor polynomial of degree 15, or 7 in float32, in powers of S⁴ (Paterson and Stockmeyer): six products,
    or four. k makes the norm at most ¼, where the remainders ¼¹⁶/16! ≈ 1e-23 and ¼⁸/8! ≈ 4e-10 leave room for the
    squarings. That norm is ‖S⁴‖₁^¼, hardly above the spectral norm, where ‖S‖₁ may be √n times as large (Al-Mohy and
    Higham, SIAM J. Matrix Anal. 31, 2009). One k, the largest, serves the batch.
    """
    square = s @ s
    powers, quartic = torch.stack([identity(s.shape[-1], s).expand_as(s), s, square, s @ square]), square @ square
    _, exponent = math.frexp(float(quartic.detach().abs().sum(dim=-2).max()) ** 0.25)
    squarings = max(0, exponent + 2)
    shrink, terms = 2.0**-squarings, 2 if s.dtype == torch.float32 else 4
    series = [[shrink**j / math.factorial(4 * i + j) for j in range(4)] for i in range(terms)]
    polynomials: list[Tensor] = list(torch.tensordot(s.new_tensor(series), powers, dims=1))
    result = polynomials.pop()
    for polynomial in reversed(polynomials):
        result = polynomial + result @ (shrink**4 * quartic)
    for _ in range(squarings):
        result = result @ result
    return result


def orthonormal(q: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """One Newton step towards the nearest orthogonal matrix, which squares the defect QᵀQ − I.

    A matrix stored in float32 is orthogonal to 1e-7 only; this lets a float64 fold rely on Q⁻¹ = Qᵀ all the same. In
    float32 itself there is nothing to gain.
    """
    return q if q.dtype == torch.float32 else q + q @ (identity(q.shape[-1], q) - q.mT @ q) / 2


def build_rotation(size: int, init: str, block: int, seed: int) -> Rotation:
    """Learned: a rotation, expm of a skew matrix."""
    return Rotation(initial_matrix(init, size, block, seed)).float()


TRANSFORMS.add("rotation", build_rotation)
