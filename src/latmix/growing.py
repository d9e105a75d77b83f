"""One large file, part by part: who was killed goes on in the middle of it.

What will be in it is known beforehand, part after part with the size of each. Beside it grows a list of its parts'
checksums (`FILE.parts`). Whatever a killed process or a power cut left, the parts that are as they were listed are
kept, and what follows the last of them is made anew. Going on costs one pass over what is there. Given up: going on
within a part.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from latmix.progress import Progress
from latmix.rundir import digest, flush, note

GROWING, PARTS = ".growing", ".parts"
PIECE = 2**24  # bytes in memory while finished parts are read


class Growing:
    """A file that is not finished. Attributes: done: how many of its parts are there."""

    def __init__(self, file: IO[bytes], sums: IO[bytes], done: int) -> None:
        self._file, self._sums, self.done = file, sums, done

    def add(self, data: memoryview) -> None:
        """The next part. Raises: OSError: it cannot be written."""
        _append(self._file, data)
        _append(self._sums, hashlib.sha256(data).digest())


@contextmanager
def growing(path: Path, sizes: Sequence[int]) -> Iterator[Growing]:
    """The file of parts of these sizes, new or with what is there of it, up to the first part that is not as it was
    listed. Its list stays beside it.

    Raises: OSError: it cannot be written.
    """
    with path.open("a+b") as file, path.with_name(path.name + PARTS).open("a+b") as sums:
        yield Growing(file, sums, _finished(file, sums, sizes))


@dataclass(frozen=True)
class Part:
    """Some bytes of the file, made when their turn comes."""

    bytes: int
    make: Callable[[], memoryview]


def grow(path: Path, parts: Sequence[Part], progress: Progress | None = None) -> None:
    """Make the file, or go on with what is there of it (`FILE.growing`); it has the name `path` when all of it is on
    the disk.

    progress: told of every part. Cost: one part in memory.

    Raises: OSError: it cannot be written; what is finished stays.
    """
    progress = progress or Progress()
    unfinished = path.with_name(path.name + GROWING)
    if not path.exists():
        with growing(unfinished, [part.bytes for part in parts]) as file:
            progress.stage("write", len(parts), file.done)
            for part in parts[file.done :]:
                data = part.make()
                assert len(data) == part.bytes
                file.add(data)
                progress.advance()
        flush(unfinished)
        note(path, digest(unfinished))
        os.replace(unfinished, path)
        flush(path.parent)
    unfinished.with_name(unfinished.name + PARTS).unlink(missing_ok=True)


def _finished(file: IO[bytes], sums: IO[bytes], sizes: Sequence[int]) -> int:
    """How many parts are there, in order and as they were listed; what follows is cut off, and the files end there."""
    file.seek(0)
    sums.seek(0)
    whole = at = 0
    for size in sizes:
        if _sum(file, size) != sums.read(hashlib.sha256().digest_size):
            break
        whole, at = whole + 1, at + size
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
