"""What commands share: progress bars, tables of scores, --set."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import rich
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

from latmix.errors import InputError
from latmix.progress import Pace, Progress


def score_table(title: str, scores: Mapping[str, Any]) -> Table:
    table = Table("measure", "mean", "95 % interval", title=title)
    for name in ("perplexity", "kl", "top1_agreement"):
        if (estimate := scores[name]) is not None:
            table.add_row(name, f"{estimate['mean']:.4f}", f"{estimate['low']:.4f} – {estimate['high']:.4f}")
    return table


def settings(pairs: list[str], flag: str = "--set") -> dict[str, str]:
    """Raises: LatmixError: not key=value."""
    for pair in pairs:
        if "=" not in pair:
            raise InputError(f"{flag} takes key=value, not '{pair}'.")
    return dict((pair.partition("=")[0], pair.partition("=")[2]) for pair in pairs)


class TerminalProgress(Progress):
    """One bar a stage, on standard error.

    Time left is by `Pace`: rich's own column forgets what is half a minute old, and says nothing of longer units.
    """

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        pace = TextColumn("{task.fields[pace]}", table_column=Column(no_wrap=True))
        note = TextColumn("{task.fields[note]}")
        self._bar = Bar(*columns, pace, note, console=rich.console.Console(stderr=True))
        self._task: TaskID | None = None
        self._pace, self._note = Pace(0), ""

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._task = self._bar.add_task(name, total=total, completed=done, note="", pace="")
        self._pace, self._note = Pace(total, done), ""

    def advance(self, note: str = "") -> None:
        assert self._task is not None
        self._note, pace = note or self._note, self._pace
        pace.advance()
        words = f"{timedelta(seconds=round(pace.left))} left, {pace.each:.3g} s each"
        self._bar.update(self._task, advance=1, pace=words, note=self._note)
