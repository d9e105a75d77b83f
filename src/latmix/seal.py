"""A finished folder under checksum: `SHA256SUMS`, as coreutils' `sha256sum` writes and checks it.

It is written last and lists every file beside it, so that a bit that flips anywhere in the folder, this file included,
is noticed when the folder is opened. It guards against accidents: who changes a file on purpose can change its line.
"""

import re
from pathlib import Path

from latmix.errors import DamagedError
from latmix.rundir import SUMS, digest, write_text

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def seal(folder: Path) -> None:
    """Cost: one pass over the files. Raises: WriteError: the file cannot be written."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != SUMS)
    write_text(folder / SUMS, "".join(f"{digest(file)}  {file.name}\n" for file in files))


def unsealed(folder: Path) -> frozenset[str]:
    """The names of the files of a sealed folder, all of them as they were. Cost: one pass over the files.

    Raises: DamagedError: a file is missing or has changed; names it.
    """
    for name, checksum in (listed := _listed(folder / SUMS)).items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"'{folder}' is incomplete: '{name}' is missing.")
        if digest(file) != checksum:
            raise DamagedError(f"'{file}' is damaged: its SHA-256 is not the one in {SUMS}.")
    return frozenset(listed)


def _listed(file: Path) -> dict[str, str]:
    """Name → checksum."""
    try:
        lines = [_LINE.fullmatch(line) for line in file.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise DamagedError(f"'{file.parent}' is incomplete: '{file.name}' is missing.") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"'{file}' cannot be read: {error}.") from error
    if not lines or None in lines:
        raise DamagedError(f"'{file}' is damaged: its lines are a checksum and a name.")
    return {match[2]: match[1] for match in lines if match}
