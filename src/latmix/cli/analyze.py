"""analyze, plan, report: why it works, what fits where, what runs did."""

from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.table import Table

from latmix.analysis.plan import plan as make_plan
from latmix.analysis.plots import plot, read_csv
from latmix.analysis.report import report as write_report
from latmix.analysis.study import Question
from latmix.analysis.study import analyze as study
from latmix.cli.app import app
from latmix.cli.run import Model
from latmix.cli.terminal import TerminalProgress
from latmix.numerics import parse_format
from latmix.recipes import DEFAULT


@app.command()
def analyze(
    model: Model,
    out: Annotated[Path, typer.Option(help="New folder for CSV files and figures.")],
    text: Annotated[
        Path | None, typer.Option(help="Text, half to learn from and half to measure on; the package's unless given.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help=r"What stands between documents (\n is a newline); one document unless given.")
    ] = None,
    site: Annotated[str, typer.Option(help="Site or input, for instance residual, qkv/0, down.")] = "residual",
    format: Annotated[str, typer.Option(help="Format of the activations (latmix list formats).")] = Question.format,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Where the error sits and what a map can win: E(T) by map, block size and place, with bounds and the optimum."""
    between = None if separator is None else separator.replace("\\n", "\n")
    question = Question(text, between, site, format, seed=seed)
    with TerminalProgress() as progress:
        folder = study(model, out, question, progress)
    block = str(parse_format(format).block)
    title = f"{site} of {model}, {format}, block {block}"
    table = Table("map", "E(T)", "/ best orthogonal", "bound / E(T)", title=title)
    for row in read_csv(folder / "errors.csv"):
        if row["block"] == block:
            factor = float(row["two_terms"]) / float(row["error"])
            table.add_row(row["map"], row["error"], f"{float(row['of_best_orthogonal']):.3f}", f"{factor:.1f}")
    rich.print(table)
    worst = sorted(read_csv(folder / "places.csv"), key=lambda row: -float(row["none"]))[:3]
    print("Largest relative error without a map: " + ", ".join(f"{row['place']} {row['none']}" for row in worst))
    print(f"CSV files are in {folder}")
    plot(folder)
    print("Figures (PNG, SVG) are beside them")


@app.command()
def plan(
    model: Model,
    format: Annotated[
        list[str] | None, typer.Option(help="A format (latmix list formats); all unless given. Repeatable.")
    ] = None,
    device_memory: Annotated[float, typer.Option(help="Memory of one device, in GB (10⁹ bytes).")] = 24.0,
    recipe: Annotated[str, typer.Option(help="A preset or a JSON file.")] = DEFAULT,
) -> None:
    """What fits where, and what quantizing will need here: from config.json alone, no weights are read."""
    found = make_plan(model, recipe, tuple(format or ()))
    title = f"{model}: {found.parameters:,} parameters, {found.quantized:,} of them in quantized linears"
    table = Table("format", "on disk", "weights in memory", f"longest context in {device_memory:g} GB", title=title)
    for size in found.checkpoints:
        context = found.longest_context(size, device_memory * 1e9)
        fits = f"{context:,} tokens" if context else "does not fit"
        table.add_row(size.format, _bytes(size.disk), _bytes(size.device), fits)
    rich.print(table)
    print(f"Keys and values: {found.cache_per_token:,} bytes a token in bfloat16; longest context {found.longest:,}")
    peak = _bytes(max(found.work.peak.values()))
    minutes = sum(found.work.seconds.values()) / 60
    costs = f"about {peak} of host memory at the peak, some {minutes:.1f} minutes if nothing else runs"
    print(f"{recipe} here: {costs}")


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """One self-contained HTML page about runs: comparison, learning, errors by layer and block, what was done."""
    print(f"The report is {write_report(runs, out)}")
