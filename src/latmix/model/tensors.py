"""Tensors in safetensors files, one at a time: looked at through a memory map, read and written in pieces.

Nothing is read before it is asked for and nothing is held after, so a checkpoint of any size costs the memory of what
is looked at. A map opens the file anew each time, and is for a few rows of a large table: every page that was looked at
counts as the process's while it is open. Whoever goes through a whole tensor reads it in pieces.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latmix.errors import DamagedError
from latmix.model.shards import Stored, read_header
from latmix.rundir import written

PIECE = 2**19
"""Elements of a large matrix that are in work at a time: 4 MiB in float64, of which some five live at once. From one
step to the next they stay in a processor's cache, and in memory that is not new from the system each time."""

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_WORDS = {dtype: word for word, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}  # written, never read


@dataclass(frozen=True)
class Tensors:
    """Named tensors and where they lie."""

    stored: Mapping[str, Stored]

    @staticmethod
    def of(files: Iterable[Path]) -> "Tensors":
        """Everything in these files. Raises: DamagedError: a file is missing or damaged."""
        found: dict[str, Stored] = {}
        for file in files:
            found |= read_header(file)
        return Tensors(found)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file, which is mapped as long as somebody holds it.

        Raises: DamagedError: there is no such tensor, or its file is damaged.
        """
        shard = self._find(name).shard
        try:
            with safe_open(shard, "pt") as file:
                found: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"'{name}' in '{shard}' cannot be read: {error}.") from error
        return found

    def pieces(self, name: str, together: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The tensor's rows, about `PIECE` elements and whole runs of `together` at a time, after the first one's
        number; each piece in memory of its own.

        Raises: DamagedError: there is no such tensor, or its file is damaged.
        """
        stored = self._find(name)
        (count, *each), dtype = stored.shape, DTYPES[stored.dtype]
        step = _step(math.prod(each), together)
        try:
            with stored.shard.open("rb") as file:
                file.seek(stored.at)
                for at in range(0, count, step):
                    piece = torch.empty((min(step, count - at), *each), dtype=dtype)
                    if file.readinto(piece.view(torch.uint8).numpy().data) != piece.nbytes:
                        raise DamagedError(f"'{stored.shard}' was cut short while it was read.")
                    yield at, piece
        except OSError as error:
            raise DamagedError(f"'{name}' in '{stored.shard}' cannot be read: {error}.") from error

    def _find(self, name: str) -> Stored:
        if name not in self.stored:
            raise DamagedError(f"The checkpoint lacks the tensor '{name}'.")
        return self.stored[name]


def rows(matrix: Tensor, together: int = 1) -> Iterator[Tensor]:
    """Rows, about `PIECE` elements and whole runs of `together` at a time."""
    yield from matrix.split(_step(matrix.shape[-1], together))


def _step(width: int, together: int = 1) -> int:
    return max(1, PIECE // max(1, width) // together) * together


@dataclass(frozen=True)
class Rows:
    """A matrix to be written that is made a few rows at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Tensor]


def write(path: Path, tensors: Mapping[str, Tensor | Rows], metadata: Mapping[str, str]) -> None:
    """One safetensors file, whole or not at all; the same tensors give the same bytes.

    Raises: LatmixError: the file cannot be written.
    """
    # widest dtypes first: every tensor then begins at a multiple of its own; within one, the largest first
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, -math.prod(tensors[name].shape), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": _WORDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    with written(path) as temporary, temporary.open("wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for name in order:
            tensor = tensors[name]
            for piece in tensor.pieces if isinstance(tensor, Rows) else (tensor,):
                file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def metadata(path: Path) -> dict[str, str]:
    """Raises: DamagedError: the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"'{path}' cannot be read: {error}.") from error
