"""How long work tells the world where it stands. The library is silent; the command line draws a bar."""

import time
from datetime import UTC, datetime
from pathlib import Path


class Progress:
    """Told of every stage and of every unit of work inside it. This one keeps silent; subclasses show."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage of `total` units (steps, layers, windows) begins; the one before it has ended.

        done: units that an earlier process did, of which nothing is told.
        """

    def advance(self, note: str = "") -> None:
        """One unit is done; `note` is a few words or a figure."""


class Pace:
    """How fast a stage goes, by what was done since it began here. Attributes: done: units, earlier ones included."""

    def __init__(self, total: int, done: int = 0) -> None:
        self.total, self.done, self._before, self._began = total, done, done, time.perf_counter()

    def advance(self) -> None:
        self.done += 1

    @property
    def each(self) -> float:
        """Seconds that a unit takes; one at least has to be done."""
        return (time.perf_counter() - self._began) / (self.done - self._before)

    @property
    def left(self) -> float:
        """Seconds until the end, at that pace."""
        return self.each * (self.total - self.done)


SILENCE = 60.0
"""Seconds after which a unit without a note has a line in the log too."""


class Logged(Progress):
    """Passes on what it is told, and keeps the units that have a note, and one a minute of the others, in a file: each
    in a line, with the seconds a unit takes and the seconds left at that pace."""

    def __init__(self, inner: Progress, file: Path) -> None:
        self._inner, self._file, self._name, self._pace, self._last = inner, file, "", Pace(0), 0.0

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._inner.stage(name, total, done)
        self._name, self._pace = name, Pace(total, done)
        self.line(f"{name}: {total} to do" + (f", {done} of them done already" if done else ""))

    def advance(self, note: str = "") -> None:
        self._inner.advance(note)
        pace = self._pace
        pace.advance()
        if note or time.perf_counter() - self._last > SILENCE:
            words = f"{note}, " if note else ""
            self.line(f"{self._name}: {pace.done}/{pace.total}, {words}{pace.each:.3g} s each, {pace.left:.0f} s left")

    def line(self, text: str) -> None:
        self._last = time.perf_counter()
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}\n")
