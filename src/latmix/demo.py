"""Four recipes on the model that ships with the package, side by side, on text that none of them was calibrated on."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table

from latmix.assets import CALIBRATION, DEMO_MODEL, EVALUATION
from latmix.errors import InputError
from latmix.evaluation import Evaluation, evaluate
from latmix.pipeline import quantize
from latmix.progress import Progress
from latmix.rundir import write_json

RECIPES = ("rtn", "gptq", "block-hadamard", "latmix-lu")
SETTINGS = {"calibration.windows": "128"}  # half the usual: a demo is watched
REPORT = "demo.json"


@dataclass(frozen=True)
class Row:
    """One recipe's result; `seconds` is the whole run without the evaluation."""

    recipe: str
    evaluation: Evaluation
    seconds: float


def run(out: Path, seed: int, progress: Progress) -> list[Row]:
    """Raises: LatmixError: `out` exists."""
    if out.exists():
        raise InputError(f"The output folder '{out}' exists; choose another --out or remove it.")
    measure = partial(evaluate, text=EVALUATION, reference=DEMO_MODEL, progress=progress)
    original = measure(DEMO_MODEL)
    rows = [Row("full precision", original, 0.0)]
    for name in RECIPES:
        finished = quantize(DEMO_MODEL, out / name, name, CALIBRATION, seed, SETTINGS, progress)
        seconds = sum(stage["seconds"] for stage in finished.summary["stages"].values())
        rows.append(Row(name, measure(out / name), seconds))
    write_json(out / REPORT, [dataclasses.asdict(row) for row in rows])
    return rows


def table(rows: list[Row]) -> Table:
    """KL (nats per token) and top-1 agreement are against full precision; MiB are on disk, s are seconds of the run."""
    first = rows[0].evaluation
    title = f"MXFP4 weights and activations, {first.windows} windows of {first.window} tokens of held-out text"
    result = Table(title=title)
    for column in ("recipe", "perplexity", "KL", "KL 95 %", "top-1", "MiB", "s"):
        result.add_column(column, no_wrap=True)
    for row in rows:
        e = row.evaluation
        assert e.kl is not None and e.top1_agreement is not None
        kl = (f"{e.kl.mean:.4f}", f"{e.kl.low:.4f}–{e.kl.high:.4f}")
        figures = (f"{e.top1_agreement.mean:.1%}", f"{e.size_bytes / 2**20:.2f}", f"{row.seconds:.0f}")
        result.add_row(row.recipe, f"{e.perplexity.mean:.2f}", *kl, *figures)
    return result
