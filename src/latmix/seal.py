"""Folders under checksum: `SHA256SUMS` of a finished one, `latmix.journal` of one in the making.

`SHA256SUMS`, as coreutils' `sha256sum` writes and checks it, is written last and lists every file beside it, so that a
bit that flips anywhere in the folder, this file included, is noticed when the folder is opened. The journal gets a line
before each file gets its name (`rundir.written`): which of the files written under a name stands there when the process
ends, its line is there. Both guard against accidents: who changes a file on purpose can change its line.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from latmix.errors import DamagedError
from latmix.progress import Progress
from latmix.rundir import JOURNAL, LOCK, LOG, SUMS, digest, digests, flush, read_json, write_text

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def seal(folder: Path, progress: Progress | None = None) -> None:
    """What the journal has one checksum of is taken at its word: it was written since, or compared when the folder was
    opened (`compare_noted`). Cost: one pass over the other files.

    Raises: WriteError: the file cannot be written.
    """
    files = [file for file in folder.iterdir() if file.is_file() and file.name not in (SUMS, JOURNAL, LOCK)]
    sums = {folder / name: min(found) for name, found in noted(folder).items() if len(found) == 1}
    sums |= digests([file for file in files if file not in sums and file.name != LOG], progress, "seal")
    sums |= {file: digest(file) for file in files if file.name == LOG}  # last: it takes what is told of the others
    write_text(folder / SUMS, "".join(f"{sums[file]}  {file.name}\n" for file in sorted(files)))


def finish(folder: Path, out: Path, progress: Progress | None = None) -> None:
    """A folder in the making becomes `out`, sealed. Raises: WriteError, OSError: it cannot."""
    seal(folder, progress)
    for name in (JOURNAL, LOCK):
        (folder / name).unlink()
    os.replace(folder, out)
    flush(out.parent)


def rewrite(file: Path, text: str) -> None:
    """Write a file of a sealed folder anew; whenever the process stops, the folder is sealed.

    Raises: WriteError: a file cannot be written.
    """
    sums = file.with_name(SUMS)
    lines, own = sums.read_text("utf-8").splitlines(keepends=True), f"  {file.name}\n"
    line = hashlib.sha256(text.encode()).hexdigest() + own
    if any(old.endswith(own) for old in lines):
        write_text(sums, "".join([*lines, line]))  # in the meantime it may be either
    write_text(file, text)
    write_text(sums, "".join([*(old for old in lines if not old.endswith(own)), line]))


def check(folder: Path, names: Collection[str] | None = None, progress: Progress | None = None) -> None:
    """These files of a sealed folder, all that are listed unless given, are as they were, or were never there.

    Cost: one pass over them.

    Raises: DamagedError: one is missing, has changed, or is there and not listed; names it.
    """
    sums, files = listed(folder), {file.name: file for file in folder.iterdir() if file.is_file()}
    names = sorted(sums if names is None else names)
    for name in names:
        if name in sums and name not in files:
            raise DamagedError(f"'{folder}' is incomplete: '{name}' is missing ({SUMS} lists it).")
        if name in files and name not in sums:
            raise DamagedError(f"'{folder}' holds '{name}', which {SUMS} does not list.")
    for file, found in digests([files[name] for name in names if name in files], progress, "check").items():
        if found not in sums[file.name]:
            raise DamagedError(f"'{file}' is damaged: its SHA-256 is not the one in {SUMS}.")


def listed(folder: Path) -> Mapping[str, set[str]]:
    """Name → checksum of what a sealed folder holds; two where a process was killed while it wrote that file anew.

    Raises: DamagedError: the list is missing or damaged.
    """
    file = folder / SUMS
    try:
        lines = [_LINE.fullmatch(line) for line in file.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise DamagedError(f"'{folder}' is incomplete: '{SUMS}' is missing.") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"'{file}' cannot be read: {error}.") from error
    if not lines or None in lines:
        raise DamagedError(f"'{file}' is damaged: its lines are a checksum and a name.")
    found: dict[str, set[str]] = {}
    for match in filter(None, lines):
        found.setdefault(match[2], set()).add(match[1])
    return found


def noted(folder: Path) -> Mapping[str, set[str]]:
    """Name → the checksums of what was written under it, from the journal; nothing where there is none."""
    found: dict[str, set[str]] = {}
    journal = folder / JOURNAL
    for line in journal.read_text("utf-8", errors="replace").splitlines() if journal.exists() else ():
        checksum, _, name = line.partition("  ")
        found.setdefault(name, set()).add(checksum)
    return found


def compare_noted(folder: Path, progress: Progress | None = None) -> None:
    """Each file that was noted is one of those that were written under its name: of a file that is written again, the
    one before stands there until the new one has the name.

    Raises: DamagedError: it is not; names it.
    """
    checksums = noted(folder)
    names = {file: str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    for file, found in digests([file for file in names if names[file] in checksums], progress, "check").items():
        if found not in checksums[names[file]]:
            raise DamagedError(f"'{file}' is not what was written there; remove '{folder}' and begin again.")


def read_noted(folder: Path, file: Path) -> Any:
    """A JSON file somewhere below the folder.

    Raises: LatmixError: missing, or not what was written there.
    """
    value = read_json(file)
    if digest(file) not in noted(folder).get(str(file.relative_to(folder)), ()):
        raise DamagedError(f"'{file}' is not what was written there; remove it, and the same command makes it again.")
    return value
