"""analyze, plan, report: why it works, what fits where, what runs did."""

from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.table import Table

from latmix.analysis.plots import plot, read_csv
from latmix.analysis.study import Question
from latmix.analysis.study import analyze as study
from latmix.cli.app import app
from latmix.cli.run import Model
from latmix.cli.terminal import TerminalProgress
from latmix.numerics import parse_format


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
