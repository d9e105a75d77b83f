"""Hidden states of all windows between two layers, in files: what enters layer k is `NAME.k.0`.

They are at once what spills to the disk when memory is short and what a killed run goes on from. Plain reads and
writes, a batch at a time: what fits stays in the system's page cache, and a full disk is an error (under a memory map
it would be a bus error). Where ranks share the windows, each writes its own, `NAME.k.FIRST` from window FIRST on, and
more or fewer ranks can go on from them. Cost: 4 bytes for each value, twice while a layer is at work. Given up: keeping
them on a GPU.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from latmix import ranks
from latmix.errors import DamagedError
from latmix.model.calibrate import BATCH
from latmix.model.source import pick_device
from latmix.rundir import written


class States:
    """Float32 hidden states, `BATCH` windows at a time.

    Attributes:
        share: the windows that go in and out here; all, unless the ranks share them.

    shape: windows, tokens in a window.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], width: int, shared: bool = False) -> None:
        self._folder, self._name, self._windows, self._each = folder, name, shape[0], (shape[1], width)
        self._shared, self.share = shared, ranks.span(shape[0], BATCH) if shared else slice(0, shape[0])

    def put(self, index: int, batches: Iterable[Float[Tensor, "batch window width"]]) -> None:
        """What enters layer `index`; where ranks share the windows, all have written theirs when this returns.

        Raises: WriteError: the disk is full.
        """
        file = self._folder / f"{self._name}.{index}.{self.share.start}"
        if self.share.start < self.share.stop:
            with written(file) as temporary, temporary.open("wb") as room:
                for batch in batches:
                    room.write(batch.float().cpu().contiguous().numpy().data)
        if self._shared:
            ranks.wait()

    def at(self, index: int) -> Iterator[Float[Tensor, "batch window width"]]:
        """Raises: DamagedError: they are gone."""
        parts = {int(part.suffix[1:]): part for part in self._parts(index)}
        for start in range(self.share.start, self.share.stop, BATCH):
            shape = (min(BATCH, self._windows - start), *self._each)
            values = torch.empty(shape)
            for first in sorted(first for first in parts if first <= start):
                at = (start - first) * values[0].nbytes
                if parts[first].stat().st_size >= at + values.nbytes:
                    break
            else:
                missing = self._folder / f"{self._name}.{index}.{start}"
                raise DamagedError(
                    f"'{missing}' is missing or cut short; remove the folder of the run and begin again."
                )
            with parts[first].open("rb") as file:
                file.seek(at)
                file.readinto(values.numpy().data)
            yield values.to(pick_device())

    def drop(self, index: int) -> None:
        for part in self._parts(index):
            part.unlink(missing_ok=True)

    def _parts(self, index: int) -> Iterator[Path]:
        yield from self._folder.glob(f"{self._name}.{index}.*")


def embedded(
    table: Float[Tensor, "vocabulary width"], windows: Int[Tensor, "windows window"]
) -> Iterator[Float[Tensor, "batch window width"]]:
    """What the embedding makes of the windows. `table` may lie in a mapped file: its rows alone are read."""
    for ids in windows.split(BATCH):
        yield F.embedding(ids, table).to(pick_device(), torch.float32)
