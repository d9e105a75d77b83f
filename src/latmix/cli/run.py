"""demo, quantize, evaluate: from a model to a run to a table."""

import dataclasses
from pathlib import Path
from typing import Annotated

import rich
import typer

import latmix
from latmix import demo
from latmix.cli.app import app
from latmix.cli.terminal import TerminalProgress, score_table, settings
from latmix.recipes import DEFAULT

Model = Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint folder.")]


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("latmix-demo"),
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Quantize the model that ships with latmix by four recipes and compare them. No downloads; a few minutes."""
    with TerminalProgress() as progress:
        rows = demo.run(out, seed, progress)
    rich.print(demo.table(rows))
    print(f"Runs and {demo.REPORT} are in {out}")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="New run directory.")],
    recipe: Annotated[str, typer.Option(help="A preset (latmix list recipes) or a JSON file.")] = DEFAULT,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to learn from; Wikipedia text of the package unless given.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every random choice; the recipe's own unless given.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value; any recipe key, such as learning.steps=100. Repeatable."),
    ] = None,
) -> None:
    """Learn transformations, fold them, quantize the weights, and measure the result on held-out calibration text."""
    with TerminalProgress() as progress:
        run = latmix.quantize(model, out, recipe, calibration, seed, settings(set_ or []), progress)
    if (scores := run.summary["held_out"]) is not None:
        rich.print(score_table(f"{run.recipe.name} on held-out calibration text", scores))
        change = run.summary["float_change_kl"]
        print(f"Maps alone, nothing rounded: KL {change['before']:.4f} before learning, {change['after']:.4f} after")
    print(f"{run.summary['size']['bits_per_weight']:.2f} bits per quantized weight; the run is in {run.path}")


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="DIR_OR_MODEL", help="A run directory or a Hugging Face folder.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    reference: Annotated[Path | None, typer.Option(help="The unquantized model, for KL and agreement.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write the result here as JSON, a log beside it; go on when stopped.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window; 2048 or the model's limit unless given.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help=r"What stands between documents (\n is a newline); one document unless given.")
    ] = None,
) -> None:
    """Perplexity of a model or run; with --reference also KL and top-1 agreement. Intervals: bootstrap over windows."""
    between = None if separator is None else separator.replace("\\n", "\n")
    with TerminalProgress() as progress:
        result = latmix.evaluate(target, text, reference, window, between, progress, json)
    values = dataclasses.asdict(result)
    title = f"{target} on {result.windows} windows of {result.window} tokens from {text}"
    rich.print(score_table(title, values))
    bits = "" if result.bits_per_weight is None else f", {result.bits_per_weight:.2f} bits per quantized weight"
    print(f"{result.size_bytes:,} bytes of tensors on disk{bits}")
