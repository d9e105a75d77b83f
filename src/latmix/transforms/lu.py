"""The learned map of LATMiX-LU: A = P L (U + diag(s)), the LU factorisation of A as its parameters.

Triangles make log|det A| a sum and the inverse two triangular solves. L and U share one parameter matrix, as in LAPACK.
Given up: because P and the signs of s are fixed, learning stays among the matrices whose pivots, in the order P, keep
their signs. That is one of 2ⁿ open cells; `QR` reaches every matrix whose determinant has the initial sign.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.transforms.base import TRANSFORMS, Dense, identity
from latmix.transforms.diagonal import Diagonal
from latmix.transforms.initial import initial_matrix


class LU(Dense):
    """A = P L (U + diag(s)): P fixed, L unit lower, U strictly upper, log|s| learned, signs of s fixed.

    Args:
        initial: A at the start, invertible (n, n); factorised in float64, parameters take its dtype.

    Cost: one n × n product for A, two triangular solves for A⁻¹; logabsdet O(n).

    Raises:
        LatmixError: `initial` is not square, or singular.
    """

    permutation: Tensor

    def __init__(self, initial: Float[Tensor, "n n"]) -> None:
        super().__init__(initial, orthogonal=False)
        p, lower, upper = torch.linalg.lu(initial.detach().double())
        self.triangles = nn.Parameter((lower.tril(-1) + upper.triu(1)).to(initial.dtype))
        self.diagonal = Diagonal(upper.diagonal()).to(initial.dtype)
        self.register_buffer("permutation", p.argmax(dim=1))  # P M = M[permutation]

    def _dense(self) -> tuple[Tensor, Tensor]:
        eye = identity(self.size, self.triangles)
        lower = self.triangles.tril(-1) + eye
        upper = self.triangles.triu(1) + self.diagonal.scale.diag()
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
        inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
        return (lower @ upper)[self.permutation], inverse[:, self.permutation]

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.diagonal.logabsdet()


def build_lu(size: int, init: str, block: int, seed: int) -> LU:
    """Learned: any linear map, as P L (U + diag(s))."""
    return LU(initial_matrix(init, size, block, seed)).float()


TRANSFORMS.add("lu", build_lu)
