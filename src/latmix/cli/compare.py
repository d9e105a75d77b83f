"""compare: recipes side by side in one table."""

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Annotated

import rich
import torch
import typer

from latmix.cli.app import app
from latmix.cli.run import Model
from latmix.cli.terminal import TerminalProgress, settings
from latmix.comparison import Texts, compare, table
from latmix.recipes import RECIPES


@app.command("compare")
def compare_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the table; what is finished in it is kept.")],
    recipes: Annotated[
        str, typer.Option(help="Presets or JSON files, separated by commas; every preset unless given.")
    ] = ",".join(RECIPES),
    seeds: Annotated[int, typer.Option(help="Seeds 0 … N − 1 of every recipe.")] = 1,
    calibration: Annotated[Path | None, typer.Option(help="Text to learn from; the package's unless given.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to measure on; the package's unless given.")] = None,
    split: Annotated[
        float | None, typer.Option(help="Calibrate on this share of --text's documents, measure on the rest.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help=r"What stands between documents (\n is a newline); one document unless given.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window, of both texts.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = "",
    task_data: Annotated[Path | None, typer.Option(help="Folder of local task files; the hub unless given.")] = None,
    task_set: Annotated[
        list[str] | None, typer.Option(help="key=value; any option of the harness, such as limit=100. Repeatable.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at the same time; one for each GPU unless given.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value; a recipe key, for the recipes that have its part. Repeatable."),
    ] = None,
) -> None:
    """Run or resume recipes on one model, any number of seeds, and write one table (Markdown, CSV, JSON) to --out."""
    between = None if separator is None else separator.replace("\\n", "\n")
    with TerminalProgress() as progress:
        rows = compare(
            model,
            _words(recipes),
            out,
            seeds=seeds,
            texts=Texts(calibration, text, split, between),
            window=window,
            tasks=_words(tasks),
            task_data=task_data,
            task_options=settings(task_set or [], "--task-set"),
            settings=settings(set_ or []),
            jobs=jobs,
            head=_head(seeds),
            progress=progress,
        )
    rich.print(table.terminal(rows, f"{model}, {seeds} seed{'s' if seeds > 1 else ''}"))
    for note in table.notes(rows):
        print(note)
    print(f"Runs and table.md, table.csv, table.json are in {out}")
    if any(row.failures for row in rows):
        raise typer.Exit(1)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _head(seeds: int) -> str:
    """What the table's figures are, on what, and the command that makes them again."""
    once = "Mean (95 % interval over windows)"
    several = f"Mean ± standard deviation over {seeds} seeds; where nothing is random, {once.lower()}"
    over = several if seeds > 1 else once
    machine = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    command = shlex.join(["latmix", *sys.argv[1:]])
    return f"""{over}, on text no recipe saw. KL in nats per token to full precision,
"/ GPTQ" the ratio of mean KL; zero-shot: mean accuracy ± standard error; recovery: mean over tasks of quantized over
full precision (95 % interval); s and MiB: seconds and peak memory of quantization; bits per quantized weight; online
operations: what runs at inference. {machine}, torch {torch.__version__}. Regenerate:

    {command}
"""
