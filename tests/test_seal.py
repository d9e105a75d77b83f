"""Folders under checksum: what is listed, what is noticed, and that a file written anew leaves no moment unsealed."""

import hashlib
import os
from pathlib import Path

import pytest

from latmix import rundir
from latmix.errors import DamagedError
from latmix.rundir import JOURNAL, SUMS, digests, write_json
from latmix.seal import check, listed, read_noted, rewrite, seal


class Killed(BaseException):
    """What no handler of errors catches, as a process that is killed runs none."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    return tmp_path


def test_what_is_not_listed_is_noticed_where_it_is_asked_for(folder: Path) -> None:
    (folder / "c").write_text("c")
    check(folder)
    check(folder, ("a", "not there"))
    with pytest.raises(DamagedError, match="holds 'c', which SHA256SUMS does not list"):
        check(folder, ("a", "c"))


@pytest.mark.parametrize("name", ["b", "new"])
def test_a_file_is_written_anew_and_the_folder_is_sealed_at_any_moment(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, seen = os.replace, set()

    def killed_at(left: int) -> None:
        """Before the file gets its name, or right after."""

        def step(old: Path, new: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            replace(old, new)
            left -= 1
            if left == 0:
                raise Killed

        monkeypatch.setattr(rundir.os, "replace", step)

    for moment in range(1, 7 if name == "b" else 5):
        killed_at(moment)
        with pytest.raises(Killed):
            rewrite(folder / name, f"as of {moment}")
        seen.add((folder / name).read_text() if (folder / name).exists() else "")
        check(folder)
    killed_at(0)
    rewrite(folder / name, "at last")
    check(folder)
    assert all(len(checksums) == 1 for checksums in listed(folder).values()) and set(listed(folder)) == {"a", "b", name}
    assert len(seen) > 1
    (folder / name).write_text("something else")
    with pytest.raises(DamagedError, match=f"{name}' is damaged"):
        check(folder)


def test_results_below_a_folder_with_a_journal_are_checked(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).touch()
    file = tmp_path / "tasks" / "one.json"
    for value in ({"accuracy": 0.5}, {"accuracy": 0.25}):
        write_json(file, value)
        assert read_noted(tmp_path, file) == value
    file.write_text(file.read_text().replace("0.25", "0.75"))
    with pytest.raises(DamagedError, match=r"one.json' is not what was written there; remove it"):
        read_noted(tmp_path, file)
    assert SUMS not in {path.name for path in tmp_path.iterdir()}


def test_what_was_damaged_since_it_was_written_is_not_sealed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).touch()
    write_json(tmp_path / "one.json", 1)
    seal(tmp_path)
    check(tmp_path)
    assert set(listed(tmp_path)) == {"one.json"}
    (tmp_path / "one.json").write_text("2\n")
    seal(tmp_path)
    with pytest.raises(DamagedError, match=r"one.json' is damaged"):
        check(tmp_path)


def test_of_what_was_written_twice_that_is_sealed_which_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / JOURNAL).touch()
    write_json(tmp_path / "one.json", 1)

    def killed(old: Path, new: Path) -> None:
        raise Killed

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(rundir.os, "replace", killed)
        write_json(tmp_path / "one.json", 2)
    for left in tmp_path.glob(".*.tmp"):
        left.unlink()
    seal(tmp_path)
    check(tmp_path)


def test_checksums_of_several_files_at_a_time(folder: Path) -> None:
    for number in range(20):
        (folder / str(number)).write_bytes(os.urandom(3000 * number))
    files = sorted(file for file in folder.iterdir())
    assert digests(files, threads=3) == {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "7").unlink()
    with pytest.raises(FileNotFoundError):
        digests(files, threads=3)
