"""Hidden states of all windows between two layers, in files: what enters layer k is `NAME.k`.

They are at once what spills to the disk when memory is short and what a killed run goes on from. Plain reads and
writes, a batch at a time: what fits stays in the system's page cache, and a full disk is an error (under a memory map
it would be a bus error). Cost: 4 bytes for each value, twice while a layer is at work. Given up: keeping them on a GPU.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from latmix.errors import DamagedError
from latmix.model.calibrate import BATCH
from latmix.model.source import pick_device
from latmix.rundir import written


class States:
    """Float32 hidden states, `BATCH` windows at a time.

    shape: windows, tokens in a window.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], width: int) -> None:
        self._folder, self._name, self._windows, self._each = folder, name, shape[0], (shape[1], width)

    def put(self, index: int, batches: Iterable[Float[Tensor, "batch window width"]]) -> None:
        """What enters layer `index`. Raises: WriteError: the disk is full."""
        with written(self._file(index)) as temporary, temporary.open("wb") as file:
            for batch in batches:
                file.write(batch.float().cpu().contiguous().numpy().data)

    def at(self, index: int) -> Iterator[Float[Tensor, "batch window width"]]:
        """Raises: DamagedError: they are gone."""
        if not self._file(index).is_file():
            raise DamagedError(f"'{self._file(index)}' is missing; remove the folder of the run and begin again.")
        with self._file(index).open("rb") as file:
            for start in range(0, self._windows, BATCH):
                shape = (min(BATCH, self._windows - start), *self._each)
                values = torch.empty(math.prod(shape))
                if file.readinto(values.numpy().data) != values.nbytes:
                    raise DamagedError(f"'{self._file(index)}' is cut short; remove its folder and run again.")
                yield values.view(shape).to(pick_device())

    def drop(self, index: int) -> None:
        self._file(index).unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self._folder / f"{self._name}.{index}"


def embedded(
    table: Float[Tensor, "vocabulary width"], windows: Int[Tensor, "windows window"]
) -> Iterator[Float[Tensor, "batch window width"]]:
    """What the embedding makes of the windows. `table` may lie in a mapped file: its rows alone are read."""
    for ids in windows.split(BATCH):
        yield F.embedding(ids, table).to(pick_device(), torch.float32)
