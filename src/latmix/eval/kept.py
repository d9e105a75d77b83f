"""An evaluation in the making: `RESULT.partial`, one file beside the one that will hold its result, and its log.

A line says what is measured, by content; a record for each finished batch of windows follows: float32 results of its
tokens and their SHA-256. The file is only appended to, and a record is on the disk before the next batch begins. So,
whatever a killed process left, the same command goes on after the last whole record. One that was cut short or has
changed is computed again, and so is all after it: no batch depends on another, so the result has the same bytes. Given
up: going on within a batch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import DamagedError, InputError, LatmixError, WriteError
from latmix.rundir import alone

SUFFIX, LOG = ".partial", ".log"


class Kept:
    """Attributes: known: of each batch that is finished already, the results; `begin` finds them."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self.known: Sequence[Float[Tensor, "measures _"]] = ()

    def begin(self, what: Mapping[str, Any], batches: Sequence[tuple[int, int]]) -> None:
        """what: is measured. batches: (measures, tokens) of each.

        Raises: LatmixError: what is there is of something else, or damaged.
        """
        _identify(self._file, self._path, what)
        self.known = _known(self._file, batches)

    def add(self, results: Float[Tensor, "measures tokens"]) -> None:
        """Those of the next batch."""
        data = results.numpy().tobytes()
        _append(self._file, data + hashlib.sha256(data).digest())


@contextmanager
def kept(result: Path) -> Iterator[Kept]:
    """What is finished of the evaluation that will be `result`; nobody needs it any more when the block ends well.

    Where the block fails before it has begun, neither it nor a log is left behind.

    Raises: LatmixError: another process makes this result, or it cannot be written.
    """
    path, log = result.with_name(result.name + SUFFIX), log_of(result)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path, f"on '{path}'; wait for it, or choose another --json") as file:
            earlier = log.exists()
            try:
                yield Kept(file, path)
            except LatmixError:
                if not path.stat().st_size:
                    path.unlink()
                    if not earlier:
                        log.unlink(missing_ok=True)
                raise
            path.unlink()
    except OSError as error:
        raise WriteError(
            f"Cannot write '{path}': {error.strerror or error}. What is finished stays there; the same command goes on."
        ) from error


def log_of(result: Path) -> Path:
    """Of the evaluations that made it."""
    return result.with_name(result.name + LOG)


def _identify(file: IO[bytes], path: Path, what: Mapping[str, Any]) -> None:
    """Note what is measured, or compare it with what is noted; the file then stands behind it."""
    head = json.dumps(what, sort_keys=True).encode() + b"\n"
    file.seek(0)
    found = file.read(len(head))
    if found == head:
        return
    if head.startswith(found):  # nothing, or as much as a killed process wrote of it
        file.truncate(0)
        return _append(file, head)
    file.seek(0)
    try:
        noted = dict(json.loads(file.readline(2 * len(head))))
    except (ValueError, TypeError, RecursionError):
        raise DamagedError(f"'{path}' is no evaluation in the making, or damaged; remove it first.") from None
    for key in sorted(what.keys() | noted.keys()):
        if (was := noted.get(key)) != (now := what.get(key)):
            raise InputError(
                f"'{path}' is of an evaluation with {key} {was!s:.80}, and now it is {now}; go on with the same "
                "settings and files, choose another --json, or remove it."
            )
    raise DamagedError(f"'{path}' is damaged; remove it first.")


def _known(file: IO[bytes], batches: Sequence[tuple[int, int]]) -> list[Float[Tensor, "measures _"]]:
    """The whole records, in order; what follows the last of them is cut off."""
    found = []
    for shape in batches:
        begin = file.tell()
        record = file.read(4 * shape[0] * shape[1] + hashlib.sha256().digest_size)
        data, checksum = record[:-32], record[-32:]
        if hashlib.sha256(data).digest() != checksum:
            file.truncate(begin)
            break
        found.append(torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy()))
    return found


def _append(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
