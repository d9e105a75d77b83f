"""The learned map of LATMiX-QR: A = Q (R + diag(s)), a learned rotation after a triangular map.

It reaches every invertible matrix whose determinant has the initial sign, since the rotation is free to turn anywhere
and a QR factorisation may choose the signs of its diagonal. Given up: speed. The rotation needs a matrix exponential
where LU has a triangle.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.transforms.base import TRANSFORMS
from latmix.transforms.dense import Dense
from latmix.transforms.diagonal import Diagonal
from latmix.transforms.initial import initial_matrix
from latmix.transforms.rotation import Rotation


class QR(Dense):
    """A = Q (R + diag(s)): Q = expm(½(G − Gᵀ)) Q₀, R strictly upper, log|s| learned, signs of s fixed.

    Args:
        initial: A at the start, invertible (n, n); factorised in float64, parameters take its dtype.

    Cost: a `Rotation`, one n × n product for A and one triangular solve for A⁻¹ = (R + diag(s))⁻¹ Qᵀ; logabsdet O(n).

    Raises:
        LatmixError: `initial` is not square, or singular.
    """

    def __init__(self, initial: Float[Tensor, "n n"]) -> None:
        super().__init__(initial, orthogonal=False)
        q, r = torch.linalg.qr(initial.detach().double())
        self.rotation = Rotation(q).to(initial.dtype)
        self.upper = nn.Parameter(r.triu(1).to(initial.dtype))
        self.diagonal = Diagonal(r.diagonal()).to(initial.dtype)

    def factors(self) -> tuple[Tensor, ...]:
        return self.upper, self.diagonal.scale, *self.rotation.factors()

    @staticmethod
    def build(*factors: Tensor) -> tuple[Tensor, Tensor]:
        upper, scale, *rotation = factors
        q, q_inverse = Rotation.build(*rotation)
        upper = upper.triu(1) + scale.diag_embed()
        return q @ upper, torch.linalg.solve_triangular(upper, q_inverse, upper=True)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.diagonal.logabsdet()


def build_qr(size: int, init: str, block: int, seed: int) -> QR:
    """Learned: any linear map, as a rotation times (R + diag(s))."""
    return QR(initial_matrix(init, size, block, seed)).float()


TRANSFORMS.add("qr", build_qr)
