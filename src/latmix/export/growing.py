"""One large file, part by part: a killed export goes on in the middle of it.

What will be in it is known beforehand, part after part with the size of each. It grows under another name
(`FILE.growing`), and beside it a list of its parts' checksums (`FILE.parts`). Whatever a killed process or a power cut
left, the parts that are as they were listed are kept, and what follows the last of them is made anew. Going on costs
one pass over what is there. Given up: going on within a part.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from latmix.rundir import digest, flush, note

GROWING, PARTS = ".growing", ".parts"
PIECE = 2**24  # bytes in memory while finished parts are read


@dataclass(frozen=True)
class Part:
    """Some bytes of the file, made when their turn comes."""

    bytes: int
    make: Callable[[], memoryview]


def grow(path: Path, parts: Sequence[Part]) -> None:
    """Make the file, or go on with what is there of it; it has the name `path` when all of it is on the disk.

    Cost: one part in memory. Raises: OSError: it cannot be written; what is finished stays.
    """
    growing, listed = (path.with_name(path.name + ending) for ending in (GROWING, PARTS))
    if not path.exists():
        with growing.open("a+b") as file, listed.open("a+b") as sums:
            for part in parts[_finished(file, sums, parts) :]:
                data = part.make()
                assert len(data) == part.bytes
                _append(file, data)
                _append(sums, hashlib.sha256(data).digest())
        flush(growing)
        note(path, digest(growing))
        os.replace(growing, path)
        flush(path.parent)
    listed.unlink(missing_ok=True)


def _finished(file: IO[bytes], sums: IO[bytes], parts: Sequence[Part]) -> int:
    """How many parts are there, in order and as they were listed; what follows is cut off, and the files end there."""
    file.seek(0)
    sums.seek(0)
    whole = at = 0
    for part in parts:
        if _sum(file, part.bytes) != sums.read(hashlib.sha256().digest_size):
            break
        whole, at = whole + 1, at + part.bytes
    file.truncate(at)
    sums.truncate(whole * hashlib.sha256().digest_size)
    return whole


def _sum(file: IO[bytes], count: int) -> bytes:
    """Of the next bytes, or of as many as are left; no checksum is empty, as what follows a list's end is."""
    found = hashlib.sha256()
    while piece := file.read(min(PIECE, count)):
        found.update(piece)
        count -= len(piece)
    return found.digest()


def _append(file: IO[bytes], data: memoryview | bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
