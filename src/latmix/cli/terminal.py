"""What commands share: progress bars, tables of scores, --set."""

from collections.abc import Mapping
from typing import Any

import rich
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column, Table

from latmix.errors import InputError
from latmix.progress import Progress


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


class Pace(ProgressColumn):
    """Seconds that a unit takes."""

    def render(self, task: Task) -> str:
        speed = task.finished_speed or task.speed
        return f"{1 / speed:.3g} s each" if speed else ""


class TerminalProgress(Progress):
    """One bar a stage, on standard error."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(
            *columns,
            TimeRemainingColumn(),
            Pace(Column(no_wrap=True)),
            TextColumn("{task.fields[note]}"),
            console=rich.console.Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def stage(self, name: str, total: int) -> None:
        self._task = self._bar.add_task(name, total=total, note="")

    def advance(self, note: str = "") -> None:
        assert self._task is not None
        if note:
            self._bar.update(self._task, note=note)
        self._bar.advance(self._task)
