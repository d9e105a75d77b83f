"""The learned map of LATMiX-LU: A = P L (U + diag(s)) Q₀: LU factors as the parameters of a step away from Q₀.

Triangles make log|det A| a sum and the inverse two triangular solves. L and U share one parameter matrix, as in LAPACK.
The paper has no Q₀ and factorises the initial rotation itself. The triangles of a Hadamard matrix are badly
conditioned: a step that is small in them is large in some directions of A and nothing in others, and learning was slow
and unsteady (docs/log.md). With the rotation split off, learning starts at L = I, U = 0, s = ±1.
Given up: because P and the signs of s are fixed, learning stays among the matrices A Q₀ᵀ whose pivots, in the order P,
keep their signs. That is one of 2ⁿ open cells; `QR` reaches every matrix whose determinant has the initial sign.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.transforms.base import TRANSFORMS, identity
from latmix.transforms.dense import Dense
from latmix.transforms.diagonal import Diagonal
from latmix.transforms.initial import initial_matrix
from latmix.transforms.rotation import orthonormal


class LU(Dense):
    """A = P L (U + diag(s)) Q₀: P and the rotation Q₀ fixed, L unit lower, U strictly upper, log|s| learned, its signs
    fixed.

    Args:
        initial: A at the start, invertible (n, n); factorised in float64, parameters take its dtype.

    Cost: two n × n products for A; two triangular solves and a product for A⁻¹; logabsdet O(n).

    Raises:
        LatmixError: `initial` is not square, or singular.
    """

    permutation: Tensor
    start: Tensor

    def __init__(self, initial: Float[Tensor, "n n"]) -> None:
        super().__init__(initial, orthogonal=False)
        q, r = torch.linalg.qr(initial.detach().double().T)  # initial = rᵀ qᵀ
        p, lower, upper = torch.linalg.lu(r.T)
        self.triangles = nn.Parameter((lower.tril(-1) + upper.triu(1)).to(initial.dtype))
        self.diagonal = Diagonal(upper.diagonal()).to(initial.dtype)
        self.register_buffer("permutation", p.argmax(dim=1))  # P M = M[permutation]
        self.register_buffer("start", q.T.to(initial.dtype).contiguous())

    def factors(self) -> tuple[Tensor, ...]:
        return self.triangles, self.diagonal.scale, self.permutation, self.start

    @staticmethod
    def build(*factors: Tensor) -> tuple[Tensor, Tensor]:
        triangles, scale, permutation, start = factors
        eye = identity(scale.shape[-1], triangles)
        lower, upper = triangles.tril(-1) + eye, triangles.triu(1) + scale.diag_embed()
        inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
        inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
        start = orthonormal(start)
        matrix = torch.take_along_dim(lower @ upper, permutation.unsqueeze(-1), -2) @ start
        return matrix, start.mT @ torch.take_along_dim(inverse, permutation.unsqueeze(-2), -1)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.diagonal.logabsdet()


def build_lu(size: int, init: str, block: int, seed: int) -> LU:
    """Learned: any linear map, as P L (U + diag(s)) Q₀."""
    return LU(initial_matrix(init, size, block, seed)).float()


TRANSFORMS.add("lu", build_lu)
