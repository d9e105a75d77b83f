"""The average of what a stage learned over its last steps.

Where weights are rounded, a step of any size turns some codes to and fro: the last step is a draw from around the
optimum, and the mean of many lies nearer to it. Each step weighs a little more than the one before (Shamir & Zhang,
1212.1824, section 4): the average follows about the last quarter of the steps so far, however many there will be.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latmix import sharding

LATE = 3
"""η: a step's weight grows with its number to this power."""


def parameters(learned: nn.Module) -> dict[str, Tensor]:
    """A copy of what a module holds: the average before the first step."""
    return {name: parameter.detach().clone() for name, parameter in learned.named_parameters()}


class Average:
    """Of a module's parameters, on every rank of the part it holds.

    values: the average so far, by parameter; it changes in place.
    """

    def __init__(self, learned: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._learned, self._values = learned, values

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Count in what was learned in that step, from 1 on."""
        for mean, now in self._pairs():
            mean.lerp_(now, (LATE + 1) / (LATE + step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, now in self._pairs():
            kept = now.clone()
            now.copy_(mean)
            mean.copy_(kept)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        every = self._learned.named_parameters()
        return [(sharding.held(self._values[name]), sharding.held(now.detach())) for name, now in every]
