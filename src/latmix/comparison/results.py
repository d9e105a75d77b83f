"""From finished cells to the rows of the table.

A figure over several seeds is their mean, its spread their standard deviation; the interval is the mean of the seeds'
own bootstrap intervals over windows, which are the same windows for every seed. Zero-shot accuracy is the mean over
tasks, each by the harness's length-normalised accuracy where it reports one. Its standard error is the harness's own,
of each task, combined; seeds answer the same items, so more of them do not make it smaller. Recovery is the mean over
tasks of quantized over full precision, its interval a bootstrap over items, drawn anew in each task and for both models
alike.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from latmix.comparison.plan import Cell
from latmix.eval.scores import COVERAGE, RESAMPLES
from latmix.rundir import SUMMARY, read_json
from latmix.seal import check, read_noted


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, their standard deviation (None of one seed), and a 95 % interval where one is known."""

    mean: float
    spread: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One recipe. Figures are None where no seed is finished; `failures` says of each other seed why it is not.

    Attributes:
        kl: nats per token to full precision; top1: share of tokens on which both predict the same.
        zero_shot, tasks: accuracy, of all tasks and of each; `spread` is its standard error here.
        recovery: share of full precision's accuracy, mean over tasks.
        seconds, peak_bytes: of quantization, evaluation aside; GPU memory where one was used.
        online: input → transform applied at run time; empty: the pure format.
        kl_to_gptq: ratio of mean KL to GPTQ's.
    """

    name: str
    seeds: int
    failures: dict[int, str]
    perplexity: Figure | None = None
    kl: Figure | None = None
    kl_to_gptq: float | None = None
    top1: Figure | None = None
    zero_shot: Figure | None = None
    recovery: Figure | None = None
    tasks: dict[str, Figure] | None = None
    seconds: Figure | None = None
    peak_bytes: int | None = None
    online: dict[str, str] | None = None
    bits_per_weight: float | None = None


def collect(cells: Sequence[Cell]) -> list[Row]:
    """A row for each recipe, in the order of the cells."""
    names = list(dict.fromkeys(cell.name for cell in cells))
    groups = {name: [cell for cell in cells if cell.name == name] for name in names}
    reference = next(cell for cell in cells if cell.recipe is None)
    baseline = _mean_kl(groups.get("gptq", []))
    return [_row(name, group, reference, baseline) for name, group in groups.items()]


def _row(name: str, cells: list[Cell], reference: Cell, baseline: float | None) -> Row:
    done = [cell for cell in cells if cell.finished]
    failures = {cell.seed: _reason(cell) for cell in cells if not cell.finished}
    if not done:
        return Row(name, 0, failures)
    results = [_read(cell, cell.evaluation) for cell in done]
    kl = figure(results, "kl")
    summaries = [_summary(cell.run) for cell in done if cell.recipe]
    tasks = done[0].measures.tasks
    return Row(
        name,
        len(done),
        failures,
        perplexity=figure(results, "perplexity"),
        kl=kl,
        kl_to_gptq=kl.mean / baseline if baseline and cells[0].recipe else None,
        top1=figure(results, "top1_agreement"),
        zero_shot=_accuracy(done, tasks) if tasks else None,
        recovery=_recovery(done, reference) if tasks and reference.finished and cells[0].recipe else None,
        tasks={task: _accuracy(done, [task]) for task in tasks} or None,
        seconds=_plain([sum(stage["seconds"] for stage in s["stages"].values()) for s in summaries]),
        peak_bytes=max((_peak(summary) for summary in summaries), default=None),
        online=dict(cells[0].recipe.online) if cells[0].recipe else None,
        bits_per_weight=results[0]["bits_per_weight"],
    )


def _read(cell: Cell, file: Path) -> Any:
    """A result of the cell. Raises: DamagedError: it is not what the cell's process wrote."""
    return read_noted(Path(cell.folder), file)


def _summary(run: Path) -> dict[str, Any]:
    check(run, (SUMMARY,))
    found: dict[str, Any] = read_json(run / SUMMARY)
    return found


def _reason(cell: Cell) -> str:
    return str(read_json(cell.failure)["reason"]) if cell.failure.is_file() else "Not computed yet."


def _mean_kl(cells: list[Cell]) -> float | None:
    done = [_read(cell, cell.evaluation)["kl"]["mean"] for cell in cells if cell.finished]
    return statistics.mean(done) if done else None


def _peak(summary: dict[str, Any]) -> int:
    stages = summary["stages"].values()
    return int(max(stage.get("peak_device_bytes", stage["peak_bytes"]) for stage in stages))


def figure(results: list[dict[str, Any]], key: str) -> Figure:
    """Of evaluations of one recipe, one for each seed."""
    low, high = (statistics.mean(result[key][end] for result in results) for end in ("low", "high"))
    found = _plain([result[key]["mean"] for result in results])
    assert found is not None
    return Figure(found.mean, found.spread, low, high)


def _plain(values: list[float]) -> Figure | None:
    if not values:
        return None
    return Figure(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)


def _accuracy(cells: list[Cell], tasks: Sequence[str]) -> Figure:
    results = [[_read(cell, cell.task(name)) for name in tasks] for cell in cells]
    mean = statistics.mean(task["accuracy"] for seed in results for task in seed)
    errors = [statistics.mean(seed[i]["stderr"] for seed in results) for i in range(len(results[0]))]
    return Figure(mean, spread=float(np.linalg.norm(errors)) / len(errors))


def _recovery(cells: list[Cell], reference: Cell) -> Figure | None:
    """Items are paired: a resample of a task takes the same items of both models. A task of which full precision has
    nothing right has no recovery; None: there is no other."""
    generator = np.random.default_rng(0)
    shares: list[float] = []
    drawn: Float[np.ndarray, " resamples"] = np.zeros(RESAMPLES)
    for name in reference.measures.tasks:
        full = np.array(_read(reference, reference.task(name))["items"])
        if not full.any():
            continue
        ours = np.mean([_read(cell, cell.task(name))["items"] for cell in cells], axis=0)
        picks = generator.integers(len(full), size=(RESAMPLES, len(full)))
        drawn += ours[picks].mean(1) / np.maximum(full[picks].mean(1), 1 / len(full))
        shares.append(float(ours.mean() / full.mean()))
    if not shares:
        return None
    low, high = np.quantile(drawn / len(shares), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Figure(statistics.mean(shares), None, float(low), float(high))


def without_recovery(rows: Sequence[Row]) -> list[str]:
    """A sentence for each task that recovery leaves out."""
    full = next((row.tasks for row in rows if row.online is None and row.tasks), {})
    return [
        f"Recovery leaves out {name}: full precision has nothing right." for name, task in full.items() if not task.mean
    ]


def ahead_of_ours(rows: Sequence[Row], ours: str = "latmix") -> list[str]:
    """A sentence for each recipe of ours that some other recipe beats in mean KL; what it pays online for that, too."""
    sentences = []
    for mine in (row for row in rows if row.name.startswith(ours) and row.kl):
        assert mine.kl is not None
        for row in rows:
            if row.online is None or row.kl is None or row.name.startswith(ours) or row.kl.mean >= mine.kl.mean:
                continue
            extra = [name for name in row.online if name not in (mine.online or {})]
            terms = f"with more online operations ({', '.join(extra)})" if extra else "at equal terms"
            sentences.append(f"{row.name} is ahead of {mine.name} in KL, {terms}.")
    return sentences
