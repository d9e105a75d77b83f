"""One map after the other, in the order in which a vector meets them (as in `nn.Sequential`)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.transforms.base import Transform


class Compose(Transform):
    """T = T_k ∘ … ∘ T₁ for parts [T₁, …, T_k]: A = A_k ⋯ A₁, v = A_k(⋯ A₂v₁ + v₂ ⋯) + v_k.

    Raises:
        LatmixError: no parts, or parts of different sizes.
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        sizes = [part.size for part in parts]
        if len(set(sizes)) != 1:
            raise InputError(f"Compose needs parts of one size, got sizes {sizes}.")
        super().__init__(sizes[0], all(part.orthogonal for part in parts))
        self.parts: Sequence[Transform] = nn.ModuleList(parts)  # type: ignore[assignment]  # is not generic

    @property
    def shift(self) -> Float[Tensor, " n"] | None:
        total: Tensor | None = None
        for part in self.parts:
            moved, own = None if total is None else part.linear(total), part.shift
            total = own if moved is None else moved if own is None else moved + own
        return total

    def _linear(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.linear(x)
        return x

    def _solve(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.solve(y)
        return y

    def _transposed_solve(self, w: Tensor) -> Tensor:
        for part in self.parts:
            w = part.transposed_solve(w)
        return w

    def logabsdet(self) -> Float[Tensor, ""]:
        return torch.stack([part.logabsdet() for part in self.parts]).sum()
