"""The closed-form optimum for white rounding errors, block by block: WUSH (arXiv 2512.00956).

Let S be the second moment of the activations x, and G = Σ WᵀW over the linears that read them. A block format adds to
y = T x an error whose variance follows the block's largest magnitudes; where these are shared out evenly (the Hadamard
matrix sees to that) it is white, of variance proportional to tr(T S Tᵀ)/n. The readers see T⁻¹ of it, which costs

    tr(T S Tᵀ) · tr(T⁻ᵀ G T⁻¹) / n = ‖T S^½‖² ‖G^½ T⁻¹‖² / n ≥ (Σ s)² / n,    G^½ S^½ = U diag(s) Vᵀ,

by Cauchy and Schwarz for the trace norm, with equality at T = H diag(s)^½ Vᵀ S^-½ for any rotation H: then T S^½ is
H diag(s)^½ Vᵀ, and G^½ T⁻¹ is U diag(s)^½ Hᵀ. The errors of the weights W T⁻¹ against T x give the same product. (A
rotation pays tr(S) tr(G) / n.) Given up: correlations between blocks, which T must not mix.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.transforms.base import TRANSFORMS, Transform
from latmix.transforms.hadamard import Hadamard

DAMPING = (
    1e-2  # added to the moments' diagonals, in units of their mean: a dead channel must not need an infinite scale
)


class Wush(Transform):
    """A = blkdiag(T₁, …, T_k), each found by `fit`; block-Hadamard until then. Nothing learns.

    Args:
        size: n.
        block: size of the blocks; the last may be shorter.

    Cost: O(n · block) per vector; `solve` factorises each block anew, O(n · block²).
    """

    def __init__(self, size: int, block: int) -> None:
        super().__init__(size, orthogonal=False)
        count, rest = divmod(size, block)
        parts = [_mixing(width).matrix().repeat(n, 1, 1) for width, n in ((block, count), (rest, 1)) if width and n]
        self.parts = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)

    @torch.no_grad()
    def fit(self, moment: Float[Tensor, "n n"], metric: Float[Tensor, "n n"]) -> None:
        """Set the blocks to the optimum for activations of this second moment and readers of this metric."""
        start = 0
        for block in (block for part in self.parts for block in part):
            inside = slice(start, start := start + len(block))
            block.copy_(optimum(moment[inside, inside].double(), metric[inside, inside].double()))

    def _linear(self, x: Tensor) -> Tensor:
        return self._each(x, lambda rows, blocks: rows @ blocks.mT)

    def _solve(self, y: Tensor) -> Tensor:
        return self._each(y, lambda rows, blocks: torch.linalg.solve(blocks.mT, rows, left=False))

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self._each(w, lambda rows, blocks: torch.linalg.solve(blocks, rows, left=False))

    def logabsdet(self) -> Float[Tensor, ""]:
        return torch.stack([torch.linalg.slogdet(part)[1].sum() for part in self.parts]).sum()

    def singular_values(self) -> Float[Tensor, " n"]:
        return torch.cat([torch.linalg.svdvals(part.detach().double()).flatten() for part in self.parts])

    def _each(self, x: Tensor, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`act` on (blocks, vectors, width) and the blocks (blocks, width, width)."""
        done = []
        for piece, part in zip(
            x.split([part.shape[0] * part.shape[1] for part in self.parts], -1), self.parts, strict=True
        ):
            rows = piece.reshape(-1, *part.shape[:2]).transpose(0, 1)
            done.append(act(rows, part.to(x.dtype)).transpose(0, 1).reshape(piece.shape))
        return torch.cat(done, dim=-1)


def optimum(moment: Float[Tensor, "b b"], metric: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    """H diag(s)^½ Vᵀ S^-½, scaled to determinant ±1 (the cost does not depend on the scale)."""
    values, vectors = torch.linalg.eigh(_damped(moment))
    root = (vectors * values.sqrt()) @ vectors.T
    inverse_root = (vectors / values.sqrt()) @ vectors.T
    weights, axes = torch.linalg.eigh(_damped(metric))
    _, s, vt = torch.linalg.svd((axes * weights.sqrt()) @ axes.T @ root)
    plain = s.sqrt()[:, None] * vt @ inverse_root
    plain = plain / torch.linalg.slogdet(plain)[1].div(len(plain)).exp()
    return _mixing(len(plain)).to(plain).linear(plain.T).T


def _mixing(size: int) -> Hadamard:
    """The Hadamard matrix of the largest powers of two that the size is made of."""
    return Hadamard(size, 1 << (size.bit_length() - 1))


def _damped(matrix: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    mean = matrix.diagonal().mean()
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    return matrix + DAMPING * unit * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def build_wush(size: int, init: str, block: int, seed: int) -> Wush:
    """Fitted in closed form to the activations and their readers, within each block."""
    return Wush(size, block)


TRANSFORMS.add("wush", build_wush)
