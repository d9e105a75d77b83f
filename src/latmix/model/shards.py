"""What the safetensors files of a checkpoint promise, checked before a byte of a tensor is read, mapped or allocated.

A header is a claim: it is read up to the format's own limit of 100 MB, and believed only if its tensors tile the file
exactly, each as long as its dtype and shape say. So nothing that is allocated later can be larger than the file it
comes from. Names in an index are file names, never paths. Symbolic links are followed: the hub's cache is made of
them, and a link is the doing of whoever unpacked the folder. Format: github.com/huggingface/safetensors, "Format".
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latmix.errors import DamagedError
from latmix.rundir import read_json
from latmix.typed import parsed

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER = 100_000_000
"""Bytes of a header, at most."""

RANK = 8
"""Axes of a tensor, at most."""

BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32},
    **{"F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64},
}


@dataclass(frozen=True)
class Stored:
    """A tensor as its header describes it: safetensors' word for its dtype, its shape, its first byte in the file."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    at: int


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in the folder `path`, by name. Cost: the headers.

    Raises: DamagedError: a shard is missing, damaged or outside the folder, or its tensors are not the index's.
    """
    index = path / INDEX
    if not index.exists():
        return read_header(path / SINGLE)
    places = _weight_map(index)
    tensors: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        tensors |= {key: found for key, found in read_header(path / name).items() if places.get(key) == name}
    if lost := sorted(places.keys() - tensors.keys()):
        raise DamagedError(f"'{path / places[lost[0]]}' lacks the tensor '{lost[0]}', which '{index}' says it holds.")
    return tensors


def read_header(shard: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file.

    Raises: DamagedError: missing, cut short, or a header that does not describe exactly the bytes that are there.
    """
    if not shard.is_file():
        raise DamagedError(
            f"The checkpoint in '{shard.parent}' is incomplete: '{shard.name}' is missing (safetensors only)."
        )
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER, size - 8):
                raise DamagedError(f"'{shard}' is cut short or is no safetensors file.")
            header = parsed(file.read(length).decode())
    except (OSError, ValueError) as error:
        raise DamagedError(f"'{shard}' has a damaged safetensors header: {error}.") from error
    if not isinstance(header, dict):
        raise DamagedError(f"'{shard}' has a damaged safetensors header: it is no JSON object.")
    header.pop("__metadata__", None)
    data = 8 + length
    described = {name: _described(entry, shard, name, data) for name, entry in header.items()}
    needed = data + _tiled(described.values(), shard)
    if size != needed:
        raise DamagedError(f"'{shard}' is cut short or damaged: {size} bytes of {needed}.")
    return {name: tensor for name, (tensor, _) in described.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor → file name."""
    values = read_json(index)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise DamagedError(f"'{index}' has no weight_map.")
    for name in places.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or not is_bare(name):
            raise DamagedError(f"'{index}' names the shard {name!r}; a shard is a .safetensors file beside the index.")
    return places


def is_bare(name: str) -> bool:
    """A file's name and nothing else, on any system."""
    return name.isprintable() and not any(sign in name for sign in "/\\:")


def _described(entry: Any, shard: Path, name: str, data: int) -> tuple[Stored, tuple[int, int]]:
    """What a header says of one tensor, and the bytes it claims, from the header's end, which is at `data`."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            dtype in BITS and len(shape) <= RANK
        ):
            whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end))
            if whole and 8 * (end - begin) == math.prod(shape) * BITS[dtype]:
                return Stored(shard, dtype, tuple(shape), data + begin), (begin, end)
    raise DamagedError(f"'{shard}' has a damaged safetensors header: its entry of '{name}' makes no sense.")


def _tiled(described: Iterable[tuple[Stored, tuple[int, int]]], shard: Path) -> int:
    """Where the last tensor ends, if each begins where the one before it ends."""
    at = 0
    for begin, end in sorted(place for _, place in described):
        if begin != at:
            raise DamagedError(f"'{shard}' has a damaged safetensors header: tensors overlap or leave a gap at {at}.")
        at = end
    return at
