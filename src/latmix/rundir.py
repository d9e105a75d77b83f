"""Run directories: a folder appears under its name when everything in it is written, or not at all.

A run is built in `NAME.partial` beside its final place and renamed at the end, so that a half-written run is never
taken for a finished one. Given up: a run directory on another file system than its parent.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latmix.errors import LatmixError, WriteError
from latmix.typed import parsed

RECIPE, SUMMARY, TRANSFORMS = "recipe.json", "summary.json", "transforms.safetensors"
METRICS, TUNING = "metrics.jsonl", "tuning.jsonl"  # the curves of the two learning stages


@contextmanager
def new_run(out: Path) -> Iterator[Path]:
    """A fresh folder to write into, which becomes `out` if the block ends well and is removed if it does not.

    Raises: LatmixError: `out` exists, or another process is writing it, or its parent cannot be written.
    """
    if out.exists():
        raise LatmixError(f"The output folder '{out}' exists; choose another --out or remove it.")
    partial = out.with_name(out.name + ".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except FileExistsError:
        raise LatmixError(
            f"'{partial}' exists: another run is writing it, or one was killed; remove it first."
        ) from None
    except OSError as error:
        raise LatmixError(f"Cannot write to '{partial.parent}': {error.strerror}.") from error
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
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"Cannot write '{path}': {error.strerror or error}.") from error


def flush(path: Path) -> None:
    """Wait until the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Raises: LatmixError: the file cannot be written."""
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
        raise LatmixError(f"'{path}' is missing.") from None
    except (OSError, ValueError) as error:
        raise LatmixError(f"'{path}' cannot be read as JSON: {error}.") from error


def is_run(path: Path) -> bool:
    return (path / RECIPE).is_file()
