"""Which cell is next, when several processes take from one list, and word of those that are done.

The list is a counter in the launcher's store (`torchrun`), so a process takes the next cell when it is free, and none
is taken twice. Without a launcher the store is in this process.
"""

import os
from collections.abc import Iterator

import torch.distributed as dist

from latmix.ranks import LAUNCHER, launched_first

TAKEN, DONE = "latmix/taken", "latmix/done"


class Queue:
    """The numbers 0 … count − 1. Attributes: first: this process is to tell of what all have done."""

    def __init__(self, count: int) -> None:
        self._count, self._told = count, 0
        self.first = launched_first()
        self._store: dist.Store = dist.HashStore()  # type: ignore[attr-defined]
        if LAUNCHER in os.environ:
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(*where, is_master=False)  # type: ignore[attr-defined]

    def take(self) -> int | None:
        """A number that nobody else has or had; None: there are no more."""
        number: int = self._store.add(TAKEN, 1) - 1
        return number if number < self._count else None

    def report(self, number: int) -> None:
        """It is done, well or not."""
        self._store.set(f"{DONE}/{self._store.add(DONE, 1)}", str(number))

    def reported(self) -> Iterator[int]:
        """What all have reported since the last call, to the first."""
        while self.first and self._told < self._store.add(DONE, 0):
            self._told += 1
            yield int(self._store.get(f"{DONE}/{self._told}"))

    @property
    def open(self) -> bool:
        """Whether there is something left to tell."""
        return self.first and self._told < self._count
