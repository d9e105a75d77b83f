"""The table of a comparison: one set of columns, shown in the terminal, in Markdown, CSV and JSON."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group
from rich.table import Table

from latmix.comparison.results import Figure, Row, ahead_of_ours, without_recovery

Show = Callable[[Row], str]
RECIPE, ONLINE, QUALITY = "recipe", "online operations", ("perplexity", "KL", "/ GPTQ", "top-1, %")


def _with_spread(figure: Figure | None, digits: int, factor: float = 1.0) -> str:
    if figure is None:
        return ""
    spread = f" ± {factor * figure.spread:.{digits}f}" if figure.spread else ""
    return f"{factor * figure.mean:.{digits}f}{spread}"


def _with_interval(figure: Figure | None, digits: int, factor: float = 1.0) -> str:
    if figure is None or figure.low is None or figure.high is None:
        return ""
    return f"{factor * figure.mean:.{digits}f} ({factor * figure.low:.{digits}f}–{factor * figure.high:.{digits}f})"


def _several(figure: Figure | None, digits: int, factor: float = 1.0) -> str:
    """Spread over seeds, or the interval over windows where there is one seed."""
    show = _with_interval if figure is not None and figure.spread is None else _with_spread
    return show(figure, digits, factor)


def online(row: Row) -> str:
    """`qkv, o: block-hadamard`; "none" for the pure format."""
    if row.online is None:
        return ""
    forms = dict.fromkeys(row.online.values())
    parts = [", ".join(name for name, form in row.online.items() if form == f) + f": {f}" for f in forms]
    return "; ".join(parts) or "none"


def _name(row: Row) -> str:
    total = row.seeds + len(row.failures)
    return row.name if not row.failures else f"{row.name} ({row.seeds} of {total} seeds)"


def _columns(figure: Callable[[Figure | None, int, float], str]) -> dict[str, Show]:
    """Title → cell; `figure` shows what was measured on every seed."""
    return {
        RECIPE: _name,
        "perplexity": lambda row: figure(row.perplexity, 3, 1.0),
        "KL": lambda row: figure(row.kl, 4, 1.0),
        "/ GPTQ": lambda row: "" if row.kl_to_gptq is None else f"{row.kl_to_gptq:.2f}",
        "top-1, %": lambda row: figure(row.top1, 1, 100.0),
        "zero-shot, %": lambda row: _with_spread(row.zero_shot, 1, 100.0),
        "recovery, %": lambda row: _with_interval(row.recovery, 1, 100.0),
        "s": lambda row: _with_spread(row.seconds, 0),
        "MiB": lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        "bits": lambda row: "" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
        ONLINE: online,
    }


def _shown(rows: Sequence[Row], columns: dict[str, Show]) -> dict[str, list[str]]:
    """Column → cells; a column that is empty throughout is left out."""
    cells = {title: [show(row) for row in rows] for title, show in columns.items()}
    return {title: column for title, column in cells.items() if any(column)}


def terminal(rows: Sequence[Row], title: str) -> Group:
    """In two parts, and intervals on lines of their own: 80 characters hold no more."""
    columns = _shown(rows, _columns(_several))
    parts = [[name for name in columns if (name in QUALITY) == quality and name != RECIPE] for quality in (True, False)]
    return Group(*(_part(columns, [RECIPE, *part], title) for part, title in zip(parts, (title, None), strict=True)))


def _part(columns: dict[str, list[str]], names: list[str], title: str | None) -> Table:
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, no_wrap=name != ONLINE, overflow="fold")
    for cells in zip(*(columns[name] for name in names), strict=True):
        table.add_row(*(cell.replace(" (", "\n(") for cell in cells))
    return table


def notes(rows: Sequence[Row]) -> list[str]:
    """Failures with their reasons, tasks that say nothing, and baselines that beat ours."""
    failed = [f"{row.name}, seed {seed}: {reason}" for row in rows for seed, reason in row.failures.items()]
    return failed + without_recovery(rows) + ahead_of_ours(rows)


def markdown(rows: Sequence[Row], head: str) -> str:
    text = head + "\n" + _grid(_shown(rows, _columns(_several)))
    tasks = list(next((row.tasks for row in rows if row.tasks), {}))
    if tasks:
        done = [row for row in rows if row.tasks]
        columns = {"accuracy, %": [row.name for row in done]}
        columns |= {task: [_with_spread(row.tasks[task], 1, 100.0) for row in done if row.tasks] for task in tasks}
        text += "\n" + _grid(columns)
    return text + "".join(f"\n- {note}" for note in notes(rows)) + ("\n" if notes(rows) else "")


def _grid(columns: dict[str, list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(rows: Sequence[Row]) -> str:
    """Full precision of every number; a figure becomes mean, spread, low and high."""
    flat = [_flat(row) for row in rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for values in flat for key in values)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return file.getvalue()


def _flat(row: Row) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in dataclasses.asdict(row).items():
        if key == "online":
            values[key] = online(row)
        elif key == "failures":
            values[key] = " | ".join(f"seed {seed}: {reason}" for seed, reason in value.items())
        elif isinstance(value, dict):
            flat = {n: p for name, part in value.items() for n, p in _parts(name, part).items()}
            values |= {f"{key}_{name}": part for name, part in flat.items()}
        elif value is not None:
            values[key] = value
    return values


def _parts(name: str, value: object) -> dict[str, object]:
    """A figure of a task: one entry for each of its numbers."""
    return {f"{name}_{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
