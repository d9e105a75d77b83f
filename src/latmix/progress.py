"""How long work tells the world where it stands. The library is silent; the command line draws a bar."""

import time
from datetime import UTC, datetime
from pathlib import Path


class Progress:
    """Told of every stage and of every unit of work inside it. This one keeps silent; subclasses show."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units (steps, layers, windows) begins; the one before it has ended."""

    def advance(self, note: str = "") -> None:
        """One unit is done; `note` is a few words or a figure."""


SILENCE = 60.0
"""Seconds after which a unit without a note has a line in the log too."""


class Logged(Progress):
    """Passes on what it is told, and keeps the units that have a note, and one a minute of the others, in a file: each
    in a line, with the seconds a unit takes and the seconds left at that pace."""

    def __init__(self, inner: Progress, file: Path) -> None:
        self._inner, self._file = inner, file
        self._name, self._total, self._done, self._began, self._last = "", 0, 0, 0.0, 0.0

    def stage(self, name: str, total: int) -> None:
        self._inner.stage(name, total)
        self._name, self._total, self._done, self._began = name, total, 0, time.perf_counter()
        self.line(f"{name}: {total} to do")

    def advance(self, note: str = "") -> None:
        self._inner.advance(note)
        self._done += 1
        now = time.perf_counter()
        each = (now - self._began) / self._done
        if note or now - self._last > SILENCE:
            left, words = each * (self._total - self._done), f"{note}, " if note else ""
            self.line(f"{self._name}: {self._done}/{self._total}, {words}{each:.3g} s each, {left:.0f} s left")

    def line(self, text: str) -> None:
        self._last = time.perf_counter()
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")
