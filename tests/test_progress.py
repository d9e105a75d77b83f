"""What is told of long work, in the terminal and in the log."""

import re
from pathlib import Path

import pytest

from latmix import progress
from latmix.cli.terminal import TerminalProgress
from latmix.progress import Logged, Progress


def test_units_without_a_note_are_in_the_log_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    log = Logged(Progress(), tmp_path / "log.txt")
    log.stage("learn", 100)
    for _ in range(10):
        now += 25.0
        log.advance()
    now += 1.0
    log.advance("held-out KL 0.1000")
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [
        "learn: 100 to do",
        "learn: 3/100, 25 s each, 2425 s left",
        "learn: 6/100, 25 s each, 2350 s left",
        "learn: 9/100, 25 s each, 2275 s left",
        "learn: 11/100, held-out KL 0.1000, 22.8 s each, 2031 s left",
    ]


def test_the_terminal_shows_units_pace_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress() as shown:
        shown.stage("quantize", 4)
        for index in range(4):
            shown.advance(f"layer {index}")
    words = capsys.readouterr().err
    assert re.search(r"quantize .*4/4 .* s each *\s*layer 3", words, re.DOTALL), words
