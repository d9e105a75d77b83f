"""Names in a run directory, and files that are there whole or not at all.

A file is written under another name, flushed to the disk and renamed, so one that has its name is whole, whenever the
process or the machine stops. Given up: folders that live on another file system than their parent.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from latmix.errors import BusyError, DamagedError, InputError, WriteError
from latmix.progress import Progress
from latmix.typed import parsed

RECIPE, SUMMARY, TRANSFORMS = "recipe.json", "summary.json", "transforms.safetensors"
METRICS, TUNING = "metrics.jsonl", "tuning.jsonl"  # the curves of the two learning stages
INPUTS, LOG = "inputs.json", "log.txt"  # what the run is made from, by content; when it did what
SUMS = "SHA256SUMS"  # of a finished folder (`latmix.seal`)
READ = 2**20  # bytes of a file in memory while its checksum is taken
LOCK, JOURNAL = "lock", "latmix.journal"  # held by who works in a folder; checksums of what was written there so far


def partial_of(out: Path) -> Path:
    """Where `out` is built, beside its final place.

    Raises: InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"The output folder '{out}' exists; choose another --out or remove it.")
    return out.with_name(out.name + ".partial")


@contextmanager
def new_run(out: Path) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `out` if the block ends well and is removed if it does not.

    Raises: LatmixError: `out` exists, or another process is writing it, or its parent cannot be written.
    """
    partial = partial_of(out)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except FileExistsError:
        raise InputError(
            f"'{partial}' exists: another run is writing it, or one was killed; remove it first."
        ) from None
    except OSError as error:
        raise WriteError(f"Cannot write to '{partial.parent}': {error.strerror}.") from error
    try:
        yield partial
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A name to write a file under; when the block ends well, the file is on the disk and has the name `path`.

    Raises: WriteError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        note(path, digest(temporary))
        os.replace(temporary, path)
        flush(path.parent)
        _sweep(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"Cannot write '{path}': {error.strerror or error}.") from error


@contextmanager
def behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Within, what is handed over is done in a thread of its own while the caller goes on. Handing over waits for what
    was handed over before, and raises what that raised, and so does the end of the block."""
    with ThreadPoolExecutor(1) as pool:
        last: Future[None] | None = None

        def hand_over(work: Callable[[], None]) -> None:
            nonlocal last
            if last is not None:
                last.result()
            last = pool.submit(work)

        yield hand_over
        hand_over(lambda: None)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of this file."""
    for leaving in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = leaving.suffixes[-2].removeprefix(".")
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            leaving.unlink(missing_ok=True)
        except (ValueError, PermissionError, OverflowError):  # no process's, or somebody else's
            continue


def note(path: Path, checksum: str) -> None:
    """Into the journal of the folder that is being filled, where there is one (`latmix.seal`)."""
    folder = next((folder for folder in path.parents[:2] if (folder / JOURNAL).exists()), None)
    if folder is not None:
        with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{checksum}  {path.relative_to(folder)}\n")
            journal.flush()
            os.fsync(journal.fileno())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process works in the folder.

    Raises: BusyError: one does.
    """
    with alone(folder / LOCK, f"in '{folder}'; wait for it, or choose another --out"):
        yield


@contextmanager
def alone(file: Path, where: str) -> Iterator[IO[bytes]]:
    """The file, to be read and appended to, which no other process has in this way; it is made where there is none.

    Raises: BusyError: another process has it, or has just given it up and removed it.
    """
    with file.open("a+b") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = os.fstat(held.fileno()).st_nlink == 0
        except BlockingIOError:
            gone = True
        if gone:
            raise BusyError(f"Another process works {where}.")
        yield held


def flush(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Raises: WriteError: the file cannot be written."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Raises: WriteError: the file cannot be written."""
    with written(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_json(path: Path) -> Any:
    """Raises: LatmixError: missing or not JSON."""
    try:
        return parsed(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"'{path}' is missing.") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"'{path}' cannot be read as JSON: {error}.") from error


def digest(path: Path, read: Callable[[], object] = lambda: None) -> str:
    """SHA-256 of a file. read: called after every `READ` bytes."""
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ):
            found.update(piece)
            read()
    return found.hexdigest()


def digests(
    files: Collection[Path], progress: Progress | None = None, stage: str = "", threads: int = 1
) -> dict[Path, str]:
    """SHA-256 of files, of as many at a time as there are threads. progress: told of every MiB, in a stage of that
    name."""
    progress, told = progress or Progress(), threading.Lock()
    if files:
        progress.stage(f"{stage}, MiB", sum(-(-file.stat().st_size // READ) for file in files))

    def read() -> None:
        with told:
            progress.advance()

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(files, pool.map(lambda file: digest(file, read), files), strict=True))


def is_run(path: Path) -> bool:
    """A finished run, if perhaps a damaged one: its summary and its checksums are what was written last."""
    return (path / SUMMARY).is_file() or (path / SUMS).is_file()
