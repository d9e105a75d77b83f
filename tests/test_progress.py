"""What is told of long work, in the terminal and in the log."""

import re
from pathlib import Path

import pytest

import latmix
from latmix import progress, rundir
from latmix.cli.terminal import TerminalProgress
from latmix.progress import Logged, Progress
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION, OTHER


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


class Told(Progress):
    """Attributes: heard: of each stage its name, units, units done before and units done since."""

    def __init__(self) -> None:
        self.heard: list[list[object]] = []

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.heard.append([name, total, done, 0])

    def advance(self, note: str = "") -> None:
        self.heard[-1][-1] += 1  # type: ignore[operator]


def lines_of(log: Path) -> list[str]:
    return [line.split(" ", 2)[2] for line in log.read_text().splitlines()]


def test_units_without_a_note_are_in_the_log_once_in_a_while(tmp_path: Path, clock: list[float]) -> None:
    log = Logged(Progress(), tmp_path / "log.txt")
    log.stage("learn", 100)
    for _ in range(10):
        clock[0] += 25.0
        log.advance()
    clock[0] += 1.0
    log.advance("held-out KL 0.1000")
    assert lines_of(tmp_path / "log.txt") == [
        "learn: 100 to do",
        "learn: 3/100, 25 s each, 2425 s left",
        "learn: 6/100, 25 s each, 2350 s left",
        "learn: 9/100, 25 s each, 2275 s left",
        "learn: 11/100, held-out KL 0.1000, 22.8 s each, 2031 s left",
    ]


def test_what_was_done_before_does_not_count_for_the_time_left(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with TerminalProgress() as shown:
        log = Logged(shown, tmp_path / "log.txt")
        log.stage("learn", 100, 60)
        clock[0] += 90.0
        log.advance()
    assert lines_of(tmp_path / "log.txt") == [
        "learn: 100 to do, 60 of them done already",
        "learn: 61/100, 90 s each, 3510 s left",
    ]
    assert re.search(r"learn .* 61/100 .* 0:58:30\s+left, 90 s\s+each", capsys.readouterr().err, re.DOTALL)


def test_the_terminal_shows_units_pace_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress() as shown:
        shown.stage("quantize", 4)
        for index in range(4):
            shown.advance(f"layer {index}")
    words = capsys.readouterr().err
    assert re.search(r"quantize .*4/4 .* s\s+each\s*layer 3", words, re.DOTALL), words


def test_a_run_that_goes_on_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the model is told in MiB; of steps and layers, those that are not taken again."""
    monkeypatch.setattr(rundir, "READ", 2**16)
    model, out, told = save_tiny(tmp_path / "model"), tmp_path / "run", Told()
    size = -(-(model / "model.safetensors").stat().st_size // 2**16)
    wish = settings("latmix-qr") | {"learning.steps": "4", "learning.evaluate_every": "1"}

    class Stop(Told):
        """In the third step, and after the first layer."""

        def advance(self, note: str = "") -> None:
            super().advance(note)
            name, _, done, since = self.heard[-1]
            if (name, done, since) in (("learning", 0, 3), ("quantize", 0, 1)):
                raise KeyboardInterrupt

    def quantize(progress: Progress) -> None:
        latmix.quantize(model, out, "latmix-qr", CALIBRATION, 0, wish, progress)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(Stop())
    quantize(told)
    assert ["read the model, MiB", size, 0, size] in told.heard
    assert ["quantize", 2, 1, 1] in told.heard
    seal = told.heard[-1]
    assert seal[0] == "seal, MiB" and seal[1] == seal[3] and seal[1] > 1  # type: ignore[operator]
    log = lines_of(out / "log.txt")
    assert log[0] == f"read the model, MiB: {size} to do" and {"load: 2 to do", "learning: 4 to do"} < set(log)
    assert "learning: 4 to do, 2 of them done already" in log
    assert "quantize: 2 to do, 1 of them done already" in log
    evaluated = Told()
    latmix.evaluate(out, OTHER, window=64, progress=evaluated, out=tmp_path / "result.json")  # and no checksum is wrong
    assert evaluated.heard[0][0] == "check, MiB" and evaluated.heard[0][1] == evaluated.heard[0][3]
