"""A file that grows part by part: whatever a kill, a full disk or a power cut left, it ends in the same bytes."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from latmix.export import fingerprint
from latmix.export import gguf as exported
from latmix.export.folder import export
from latmix.export.streamed import Streamed
from latmix.growing import GROWING, PARTS, Part, grow
from tests.exported import WITH_GGUF, Runs

BYTES = [os.urandom(size) for size in (700, 1, 40_000, 3000)]
WHOLE = b"".join(BYTES)


def parts(made: list[int]) -> list[Part]:
    """`made` gets the number of each that is made."""

    def make(place: int) -> memoryview:
        made.append(place)
        return memoryview(BYTES[place])

    return [Part(len(data), lambda place=place: make(place)) for place, data in enumerate(BYTES)]


def stopped(monkeypatch: pytest.MonkeyPatch, at: int, action: Callable[[], None]) -> None:
    """Before the n-th time that a file gets its name or is waited for."""
    count = itertools.count(1)

    def before(real: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            if next(count) == at:
                action()
            return real(*args)

        return counted

    monkeypatch.setattr(os, "fsync", before(os.fsync))
    monkeypatch.setattr(os, "replace", before(os.replace))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", range(1, 13))
def test_a_killed_file_goes_on_after_its_last_whole_part(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, first, second = tmp_path / "file", list[int](), list[int]()
    with monkeypatch.context() as patch:
        stopped(patch, at, interrupt)
        if at < 12:  # two for each part, one for the file, its name, its folder
            with pytest.raises(KeyboardInterrupt):
                grow(file, parts(first))
        else:
            grow(file, parts(first))
    assert file.exists() == (at > 10)
    grow(file, parts(second))
    assert file.read_bytes() == WHOLE and [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(first) + len(second) == (5 if at in (1, 3, 5, 7) else 4)  # what was not listed is made twice


@pytest.mark.parametrize("damage", ["cut short", "a bit flipped", "longer", "list lost", "list cut short", "file lost"])
def test_what_is_not_as_it_was_listed_is_made_anew(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = tmp_path / "file", list[int]()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped(patch, 9, interrupt)
        grow(file, parts([]))
    growing, listed = (tmp_path / f"file{GROWING}{ending}" for ending in ("", PARTS))
    data = growing.read_bytes()
    assert data == WHOLE
    if damage == "list lost":
        listed.unlink()
    elif damage == "list cut short":
        listed.write_bytes(listed.read_bytes()[:-5])
    elif damage == "file lost":
        growing.unlink()
    else:
        changed = data[:702] + bytes([data[702] ^ 8]) + data[703:]
        growing.write_bytes({"cut short": data[:-1], "longer": data + b"x"}.get(damage, changed))
    grow(file, parts(made))
    assert file.read_bytes() == WHOLE
    kept = {"cut short": 3, "a bit flipped": 2, "longer": 4, "list cut short": 3}.get(damage, 0)
    assert made == [*range(kept, 4)]


def test_a_full_disk_leaves_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def full() -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        stopped(patch, 5, full)
        grow(tmp_path / "file", parts([]))
    grow(tmp_path / "file", parts(made))
    assert made == [2, 3] and (tmp_path / "file").read_bytes() == WHOLE


@WITH_GGUF
def test_a_killed_gguf_goes_on_in_the_middle(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CONTINUE", 1)
    run, made = runs("gptq"), list[str]()
    whole = export(run, "gguf", tmp_path / "whole")
    blocks = exported._blocks

    def counted(source: object, path: str, order: object) -> object:
        if len(made) == 5:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(path)
        return blocks(source, path, order)

    monkeypatch.setattr(exported, "_blocks", counted)
    with pytest.raises(KeyboardInterrupt):
        export(run, "gguf", tmp_path / "out")
    export(run, "gguf", tmp_path / "out")
    assert len(set(made)) == len(made) == 1 + 14  # a linear each, none of them twice
    assert _same(tmp_path / "out", whole)


def test_a_killed_fingerprint_goes_on_after_its_last_token(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "CONTINUE", 5)
    run, passes = runs("gptq"), list[int]()
    whole = export(run, "transformers", tmp_path / "whole")
    hidden = Streamed.hidden

    def counted(self: Streamed, *asked: object) -> object:
        passes.append(len(asked))
        if len(passes) == 4:
            raise KeyboardInterrupt
        return hidden(self, *asked)

    monkeypatch.setattr(Streamed, "hidden", counted)
    with pytest.raises(KeyboardInterrupt):
        export(run, "transformers", tmp_path / "out")
    export(run, "transformers", tmp_path / "out")
    assert passes == [2] + [1] * 6  # the windows once, five tokens, and the one that was killed
    assert _same(tmp_path / "out", whole)


def _same(folder: Path, other: Path) -> bool:
    """But for the card, which says where it is, for the log, and so for their checksums."""
    apart = ("README.md", "log.txt", "SHA256SUMS")
    ours, theirs = (
        {file.name: file.read_bytes() for file in each.iterdir() if file.name not in apart} for each in (folder, other)
    )
    return ours == theirs
