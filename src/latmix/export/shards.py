"""Tensors to safetensors shards, one tensor in memory at a time; a killed export goes on where it stopped.

A shard that has its name is whole (`rundir.written`). What the folder is being filled with is noted first
(`plan.json`): another export, or the same of a changed run, does not resume it. What is finished is in a journal, and
the whole folder is sealed at the end (`latmix.seal`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latmix.errors import InputError, WriteError
from latmix.model.tensors import Rows, write
from latmix.progress import Progress
from latmix.rundir import JOURNAL, LOCK, LOG, SUMS, digest, locked, partial_of, read_json, write_json
from latmix.seal import compare_noted, finish

SHARD = 2**31
"""Bytes in a shard, at most (a larger tensor has a shard of its own)."""

PLAN = "plan.json"
MADE = (LOCK, JOURNAL, LOG)  # before the plan


@dataclass(frozen=True)
class Piece:
    """A tensor of the export, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, written: Callable[[], object]) -> Rows:
        """written: called when it is."""

        def whole() -> Iterator[Tensor]:
            yield self.make()
            written()

        return Rows(self.shape, self.dtype, whole())


@contextmanager
def filling(out: Path, plan: Any, progress: Progress | None = None) -> Iterator[Path]:
    """The folder `OUT.partial` to fill, new or that of a killed export with the same plan; at the end it becomes `out`.

    progress: told of what is read for checksums.

    Raises: LatmixError: `out` exists, the partial folder is damaged or another export's, another process works in it,
        or it cannot be written.
    """
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            partial_of(out)  # whoever had the lock may have finished
            _identify(partial, plan, progress)
            yield partial
            finish(partial, out, progress)
    except OSError as error:
        raise WriteError(f"Cannot write to '{partial}': {error}. The same command goes on from there.") from error


def _identify(partial: Path, plan: Any, progress: Progress | None) -> None:
    compare_noted(partial, progress)
    if (partial / PLAN).exists():
        if read_json(partial / PLAN) != plan:
            raise InputError(f"'{partial}' is another export's, or of a run that has changed since; remove it first.")
    elif strange := [path.name for path in partial.iterdir() if path.name not in MADE and path.suffix != ".tmp"]:
        raise InputError(f"'{partial}' holds '{strange[0]}' but no {PLAN}: it is no export of latmix; remove it first.")
    for leaving in partial.glob(".*.tmp"):  # of a process that was killed in the middle of a file
        leaving.unlink()
    (partial / JOURNAL).touch()
    write_json(partial / PLAN, plan)


def write_shards(pieces: list[Piece], folder: Path, progress: Progress, limit: int = SHARD) -> None:
    """`model-00001-of-0000N.safetensors` and their index, or one `model.safetensors`. Finished shards are skipped."""
    groups = grouped(pieces, limit)
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else ["model.safetensors"]
    left = {name: group for name, group in zip(names, groups, strict=True) if not (folder / name).exists()}
    progress.stage("write", len(pieces), len(pieces) - sum(map(len, left.values())))
    for name, group in left.items():
        write(folder / name, {piece.name: piece.rows(progress.advance) for piece in group}, {})
    if len(groups) > 1:
        where = {piece.name: name for name, group in zip(names, groups, strict=True) for piece in group}
        total = sum(piece.bytes for piece in pieces)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def grouped(pieces: list[Piece], limit: int) -> list[list[Piece]]:
    """In order, each group at most `limit` bytes unless it is a single piece."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if groups[-1] and filled + piece.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.bytes
    return groups


def plan_of(source: Path, target: str, version: str) -> dict[str, Any]:
    """What an export is made from: the run's files by content, which opening it has compared with their checksums."""
    return {"target": target, "version": version, "run": digest(source / SUMS)}
