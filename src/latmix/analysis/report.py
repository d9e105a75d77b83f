"""`latmix report`: runs → one HTML file that needs nothing else: no network, no script, light or dark as the reader's.

It reads run directories only; nothing is measured again. Sections that no run has data for are left out. Given up:
comparing runs whose held-out text differs; the table says which text each was measured on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from latmix.analysis.charts import chart, errors, table
from latmix.analysis.svg import Words, lines
from latmix.errors import DamagedError, InputError
from latmix.rundir import METRICS, RECIPE, SUMMARY, TUNING, is_run, read_json, write_text
from latmix.seal import check
from latmix.typed import parsed

CURVES = {"Learning": METRICS, "Tuning": TUNING}
OBJECTIVES = {"kl": "KL of every batch", "cross-entropy": "cross-entropy of every batch"}


@dataclass(frozen=True)
class Record:
    """What a run directory says about itself."""

    name: str
    recipe: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, list[dict[str, Any]]]


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page; returns its path.

    Raises: LatmixError: no run there, a damaged one, one named twice, or `out` exists or cannot be written.
    """
    if out.exists():
        raise InputError(f"'{out}' exists; choose another --out or remove it.")
    page = render([read(run, name) for run, name in zip(runs, names(runs), strict=True)])
    try:
        page.encode()
    except UnicodeEncodeError as error:
        raise DamagedError(
            f"A run's {RECIPE} or {SUMMARY} holds characters that no page can: {error.reason}."
        ) from error
    write_text(out, page)
    return out


def names(runs: Sequence[Path]) -> list[str]:
    """What tells the runs apart: the last folder of their paths that differs everywhere (all cells of a comparison hold
    a folder `run`), or else as much of their ends as it takes.

    Raises: InputError: one is named twice.
    """
    parts = [run.resolve().parts for run in runs]
    if twice := [str(run) for run, path in zip(runs, parts, strict=True) if parts.count(path) > 1]:
        raise InputError(f"The run '{twice[0]}' is named twice.")
    longest = max(map(len, parts), default=0)
    ends = [[path[-depth:] for path in parts] for depth in range(1, longest + 1)]
    found = next((each for each in ends if len(set(each)) == len(runs)), [])
    first = [path[0] for path in found]
    return first if len(set(first)) == len(runs) else ["/".join(path) for path in found]


def read(run: Path, name: str) -> Record:
    """Raises: LatmixError: not a run, or damaged."""
    if not is_run(run):
        raise InputError(f"'{run}' is not a run directory: it has no {SUMMARY}.")
    check(run, (RECIPE, SUMMARY, *CURVES.values()))
    curves = {title: _steps(run / file) for title, file in CURVES.items()}
    recipe, summary = (read_json(run / name) for name in (RECIPE, SUMMARY))
    if not isinstance(recipe, dict) or not isinstance(summary, dict):
        raise DamagedError(f"The {RECIPE} or {SUMMARY} of '{run}' is no JSON object.")
    return Record(name, recipe, summary, curves)


def _steps(path: Path) -> list[dict[str, Any]]:
    """The learning curve of a stage; empty where the run had none."""
    try:
        steps = [parsed(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise DamagedError(f"'{path}' is damaged: {error}.") from error
    if not all(isinstance(step, dict) for step in steps):
        raise DamagedError(f"'{path}' is damaged: a line is no step.")
    return steps


def render(records: Sequence[Record]) -> str:
    """The page. Raises: LatmixError: a summary lacks what every run has."""
    try:
        curves = [_learning(title, records) for title in CURVES]
        sections = [_comparison(records), *curves, *(_run(record) for record in records)]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedError(
            f"A run's {RECIPE}, {SUMMARY} or {METRICS} is damaged or of another version: {error!r}."
        ) from error
    style = (Path(__file__).parent / "report.css").read_text("utf-8")
    title = "latmix: " + ", ".join(escape(record.name) for record in records)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{style}</style></head><body><main><h1>latmix report</h1>'
        + "".join(sections)
        + "</main></body></html>\n"
    )


def _comparison(records: Sequence[Record]) -> str:
    head = ("run", "recipe", "seed", "perplexity", "KL", "KL 95 %", "top-1", "bits / weight", "MB", "s", "peak MB")
    rows = []
    for record in records:
        s, held_out = record.summary, record.summary["held_out"]
        stages, figures = s["stages"].values(), ["not measured"] * 4
        if held_out is not None:
            kl, agreement = held_out["kl"], held_out["top1_agreement"]["mean"]
            figures = [
                f"{held_out['perplexity']['mean']:.3f}",
                f"{kl['mean']:.4f}",
                f"{kl['low']:.4f}–{kl['high']:.4f}",
            ]
            figures.append(f"{agreement:.1%}")
        figures.append(f"{s['size']['bits_per_weight']:.2f}")
        costs = [sum(cost["seconds"] for cost in stages), max(cost["peak_bytes"] for cost in stages) / 1e6]
        figures += [f"{s['size']['bytes'] / 1e6:.2f}", f"{costs[0]:.1f}", f"{costs[1]:.0f}"]
        rows.append([record.name, record.recipe["name"], str(record.recipe["seed"]), *figures])
    note = "Measured on the held-out part of each run's calibration text; KL in nats per token to full precision."
    return f"<section><h2>Runs side by side</h2><p>{note}</p>{table(head, rows)}</section>"


def _learning(title: str, records: Sequence[Record]) -> str:
    learned = {record.name: record.curves[title] for record in records if record.curves[title]}
    if not learned:
        return ""
    held_out = {
        name: [(s["step"], s["held_out"]) for s in steps if s["held_out"] is not None]
        for name, steps in learned.items()
    }
    ends = "; ".join(f"{name} from {v[0][1]:.4f} to {min(y for _, y in v):.4f} at best" for name, v in held_out.items())
    words = Words(f"{title}: held-out KL", "step", "nats per token", ends + ".")
    rows = [[name, f"{step}", f"{value:.5f}"] for name, points in held_out.items() for step, value in points]
    charts = chart(lines(words, held_out), ("run", "step", "held-out KL"), rows)
    kinds = {record.name: record.recipe[title.lower()]["objective"] for record in records if record.name in learned}
    for kind in dict.fromkeys(kinds.values()):  # losses of different kinds share no axis
        loss = {name: [(s["step"], s["loss"]) for s in learned[name][1:]] for name in learned if kinds[name] == kind}
        charts += _losses(f"{title}: {OBJECTIVES[kind]}", loss) if all(loss.values()) else ""
    return f'<section><h2>{title}</h2><div class="charts">{charts}</div></section>'


def _losses(title: str, loss: Mapping[str, list[tuple[int, float]]]) -> str:
    last = "; ".join(f"{name} ends at {points[-1][1]:.4f}" for name, points in loss.items())
    words = Words(title, "step", "nats per token", last + ".")
    some = [[n, f"{x}", f"{y:.5f}"] for n, points in loss.items() for x, y in points[:: max(1, len(points) // 20)]]
    return chart(lines(words, loss), ("run", "step", "loss"), some)


def _run(record: Record) -> str:
    s, recipe = record.summary, record.recipe
    learns, own = recipe["learning"] or recipe["tuning"], recipe["calibration"]["generated"]
    facts = [
        ["model", s["model"]],
        ["formats", f"weights {recipe['weights']}, activations {recipe['activations'] or 'as they are'}"],
        ["weight quantizer", recipe["quantizer"]],
        ["maps folded", _pairs(recipe["folded"])],
        ["maps at run time", _pairs(recipe["online"])],
        ["seed", str(recipe["seed"])],
        [
            "calibration",
            f"{s['calibration']['text']}, {s['calibration']['shape'][0]} windows of {s['calibration']['shape'][1]}"
            + (f"; {own} that the model wrote itself, to learn from" if learns and own else ""),
        ],
        ["sha256 of the text", s["calibration"]["sha256"]],
        ["maps alone, nothing rounded", _change(s["float_change_kl"])],
        ["versions", _pairs(s["versions"])],
        ["kernels", s["kernels"]],
    ]
    stages = [[n, f"{c['seconds']:.1f}", f"{c['peak_bytes'] / 1e6:.0f}"] for n, c in s["stages"].items()]
    maps = [[n, f"{m['condition']:.3f}", f"{m['logabsdet']:.3f}"] for n, m in s["maps"].items()]
    parts = [
        f"<h2>{escape(record.name)}</h2>",
        f'<div class="facts">{table(("what was done", ""), facts)}</div>',
        errors(s.get("errors", {})),
    ]
    parts.append("<h3>What it took</h3>" + table(("stage", "s", "peak MB"), stages))
    if maps:
        parts.append("<h3>Maps</h3>" + table(("map", "condition number", "log |det|"), maps))
    parts.append(f"<details><summary>Recipe</summary><pre>{escape(json.dumps(recipe, indent=2))}</pre></details>")
    return f"<section>{''.join(parts)}</section>"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "none"


def _change(change: Mapping[str, float]) -> str:
    before, after = (abs(round(change[key], 4)) for key in ("before", "after"))  # rounding errors may be negative
    return f"KL {before:.4f} before learning, {after:.4f} after"
