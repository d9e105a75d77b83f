"""Block-diagonal maps: independent parts side by side, or one part used many times.

A map that stays inside the blocks of an MX format cannot carry an outlier into another block. One map per head is what
commutes with attention, and `Repeat` is how the output projection sees such a map under grouped queries.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.transforms.base import Map, Transform


class Block(Transform):
    """A = blkdiag(A₁, …, A_k), v = (v₁, …, v_k): parts of any class and size, each with its own parameters.

    Cost: a loop, so k launches per application; a batched form would be faster for many small parts of one class.

    Raises:
        LatmixError: no parts.
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        if not parts:
            raise InputError("Block needs at least one part.")
        super().__init__(sum(part.size for part in parts), all(part.orthogonal for part in parts))
        self.parts: Sequence[Transform] = nn.ModuleList(parts)  # type: ignore[assignment]  # is not generic
        self.sizes = [part.size for part in parts]

    @property
    def shift(self) -> Float[Tensor, " n"] | None:
        shifts = [part.shift for part in self.parts]
        if all(shift is None for shift in shifts):
            return None
        zeros = torch.split(self.reference.new_zeros(self.size), self.sizes)
        return torch.cat([zero if shift is None else shift for shift, zero in zip(shifts, zeros, strict=True)])

    def _linear(self, x: Tensor) -> Tensor:
        return self._each([part.linear for part in self.parts], x)

    def _solve(self, y: Tensor) -> Tensor:
        return self._each([part.solve for part in self.parts], y)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self._each([part.transposed_solve for part in self.parts], w)

    def logabsdet(self) -> Float[Tensor, ""]:
        return torch.stack([part.logabsdet() for part in self.parts]).sum()

    def singular_values(self) -> Float[Tensor, " n"]:
        return torch.cat([part.singular_values() for part in self.parts])

    @property
    def order(self) -> int:
        return self.sizes[0] if len(set(self.sizes)) == 1 else self.size

    def part(self, some: slice) -> Transform:
        if self.order == self.size:
            return self
        return Block([self.parts[number] for number in range(some.start // self.order, some.stop // self.order)])

    def _each(self, maps: list[Map], x: Tensor) -> Tensor:
        pieces = torch.split(x, self.sizes, dim=-1)
        return torch.cat([f(piece) for f, piece in zip(maps, pieces, strict=True)], dim=-1)


class Repeat(Transform):
    """Each head of `inner` used by `repeat` neighbours: of heads · repeat heads, number h = k · repeat + j has block k.

    This is how grouped-query attention lays its query heads over the value heads (heads = KV heads, and `inner` a
    block-diagonal map over them). With one head it is blkdiag(inner, …, inner). No parameters of its own.

    Args:
        inner: size heads · head_dim.
        repeat: uses of each head.
        heads: heads in `inner`.

    Raises:
        LatmixError: `heads` does not divide the size of `inner`, or `repeat` is not positive.
    """

    def __init__(self, inner: Transform, repeat: int, heads: int = 1) -> None:
        if heads < 1 or inner.size % heads:
            raise InputError(f"Repeat: {heads} heads do not divide the inner size {inner.size}.")
        super().__init__(inner.size * repeat, inner.orthogonal)
        self.inner = inner
        self.repeat = repeat
        self.heads = heads

    @property
    def shift(self) -> Float[Tensor, " n"] | None:
        inner = self.inner.shift
        if inner is None:
            return None
        return torch.unflatten(inner, 0, (self.heads, -1)).repeat_interleave(self.repeat, dim=0).flatten()

    def _linear(self, x: Tensor) -> Tensor:
        return self._through(self.inner.linear, x)

    def _solve(self, y: Tensor) -> Tensor:
        return self._through(self.inner.solve, y)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self._through(self.inner.transposed_solve, w)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.repeat * self.inner.logabsdet()

    def singular_values(self) -> Float[Tensor, " n"]:
        return self.inner.singular_values()

    def _through(self, inner: Map, x: Tensor) -> Tensor:
        x = torch.unflatten(x, -1, (self.heads, self.repeat, -1)).transpose(-3, -2).flatten(-2)  # (…, repeat, inner)
        return torch.unflatten(inner(x), -1, (self.heads, -1)).transpose(-3, -2).flatten(-3)
