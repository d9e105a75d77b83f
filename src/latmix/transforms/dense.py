"""Maps whose matrix has no structure left to exploit (LU, QR, rotations), and when that matrix is built.

Given up: caching by default. A dense map rebuilds its matrices at every call, which is slow and never stale;
`evaluated_once` is the one place where they are shared, and it ends where its `with` block ends. Maps of one form and
size are built there in one batch: a model has a small map for each head of each layer, and one after the other they
cost more to launch than to compute.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.transforms.base import Transform


class Dense(Transform):
    """A = A(factors): every application is one matrix product.

    Cost: outside `evaluated_once` each call builds A and A⁻¹, O(n³), before its O(n²) per vector.
    """

    def __init__(self, initial: Tensor, orthogonal: bool) -> None:
        if initial.ndim != 2 or initial.shape[0] != initial.shape[1]:
            raise InputError(f"{type(self).__name__} starts from a square matrix, got shape {tuple(initial.shape)}.")
        super().__init__(initial.shape[0], orthogonal)
        self._shared: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """What the matrices are made of, as it is now: the arguments of `build`."""

    @staticmethod
    @abstractmethod
    def build(*factors: Tensor) -> tuple[Tensor, Tensor]:
        """(A, A⁻¹) from the factors of one map, or of many stacked along leading dimensions."""

    @final
    def matrices(self) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
        """(A, A⁻¹): built anew, or shared inside `evaluated_once`."""
        return self.build(*self.factors()) if self._shared is None else self._shared

    def _linear(self, x: Tensor) -> Tensor:
        return x @ self.matrices()[0].T.to(x.dtype)

    def _solve(self, y: Tensor) -> Tensor:
        return y @ self.matrices()[1].T.to(y.dtype)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return w @ self.matrices()[1].to(w.dtype)


@contextmanager
def evaluated_once(module: nn.Module) -> Iterator[None]:
    """Build the matrices of every dense transform at or below `module` once, here, and share them until the exit.

    The autograd graph is shared too: a second backward pass inside needs `retain_graph`, and gradients flow only if
    they were enabled at the entry. Parameters must not change inside. Blocks nest; the outermost owns what is shared.
    (Building here, not at the first use, keeps activation checkpointing right: a recomputed forward meets the same
    tensors.)
    """
    owned = [dense for dense in dict.fromkeys(_outermost(module)) if dense._shared is None]
    try:
        for alike in _alike(owned):
            factors = [torch.stack(each) for each in zip(*(dense.factors() for dense in alike), strict=True)]
            for dense, *matrices in zip(alike, *map(torch.unbind, alike[0].build(*factors)), strict=True):
                dense._shared = tuple(matrices)
        yield
    finally:
        for dense in owned:
            dense._shared = None


def _outermost(module: nn.Module) -> Iterable[Dense]:
    """The dense maps at or below `module`, without those that are part of another."""
    return [module] if isinstance(module, Dense) else chain.from_iterable(map(_outermost, module.children()))


def _alike(maps: list[Dense]) -> Iterable[list[Dense]]:
    """Groups of one class whose factors agree in shape, dtype and device."""
    groups: dict[object, list[Dense]] = {}
    for dense in maps:
        key = (type(dense), *((each.shape, each.dtype, each.device) for each in dense.factors()))
        groups.setdefault(key, []).append(dense)
    return groups.values()
