"""The command line: words in, library calls, tables out. Few flags; everything else is a recipe key given to --set."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import rich
import transformers
import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

import latmix
from latmix import archs, demo, recipes, rundir, transforms
from latmix.errors import LatmixError
from latmix.numerics import FORMATS, SCALE_RULES, BlockFormat
from latmix.progress import Progress

app = typer.Typer(
    name="latmix",
    help="Turn a Hugging Face language model into a 4-bit microscaling (MX) model that keeps its accuracy.",
    epilog="Start with: latmix demo. Then: latmix quantize MODEL --out RUN, latmix evaluate RUN --text FILE.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint folder.")]


class Kind(StrEnum):
    recipes = "recipes"
    formats = "formats"
    transforms = "transforms"
    architectures = "architectures"


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("latmix-demo"),
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Quantize the model that ships with latmix by four recipes and compare them. No downloads; some three minutes."""
    with TerminalProgress() as progress:
        rows = demo.run(out, seed, progress)
    rich.print(demo.table(rows))
    print(f"Runs and {demo.REPORT} are in {out}")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="New run directory.")],
    recipe: Annotated[str, typer.Option(help="A preset (latmix list recipes) or a JSON file.")] = "latmix-lu",
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
        run = latmix.quantize(model, out, recipe, calibration, seed, _settings(set_ or []), progress)
    rich.print(_table(f"{run.recipe.name} on held-out calibration text", run.summary["held_out"]))
    change = run.summary["float_change_kl"]
    print(f"Maps alone, nothing rounded: KL {change['before']:.4f} before learning, {change['after']:.4f} after")
    print(f"{run.summary['size']['bits_per_weight']:.2f} bits per quantized weight; the run is in {run.path}")


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="DIR_OR_MODEL", help="A run directory or a Hugging Face folder.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    reference: Annotated[Path | None, typer.Option(help="The unquantized model, for KL and agreement.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window; 2048 or the model's limit unless given.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help=r"What stands between documents (\n is a newline); one document unless given.")
    ] = None,
) -> None:
    """Perplexity of a model or run; with --reference also KL and top-1 agreement. Intervals: bootstrap over windows."""
    between = None if separator is None else separator.replace("\\n", "\n")
    result = latmix.evaluate(target, text, reference, window, between)
    values = dataclasses.asdict(result)
    if json is not None:
        rundir.write_json(json, values)
    title = f"{target} on {result.windows} windows of {result.window} tokens from {text}"
    rich.print(_table(title, values))
    bits = "" if result.bits_per_weight is None else f", {result.bits_per_weight:.2f} bits per quantized weight"
    print(f"{result.size_bytes:,} bytes of tensors on disk{bits}")


@app.command("list")
def list_command(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything unless given.")] = None,
) -> None:
    """List what latmix knows by name."""
    rows = {
        Kind.recipes: [(name, inspect.getdoc(make) or "") for name, make in recipes.RECIPES.items()],
        Kind.formats: [(name, _about(format)) for name, format in FORMATS.items()],
        Kind.transforms: [(name, inspect.getdoc(make) or "") for name, make in transforms.TRANSFORMS.items()],
        Kind.architectures: [(name, arch.causal_lm) for name, arch in archs.ARCHS.items()],
    }
    for section in [kind] if kind else list(Kind):
        table = Table(title=section.value, show_header=False, title_justify="left")
        for name, text in rows[section]:
            table.add_row(name, text.partition("\n")[0])
        rich.print(table)


def _table(title: str, scores: Mapping[str, Any]) -> Table:
    table = Table("measure", "mean", "95 % interval", title=title)
    for name in ("perplexity", "kl", "top1_agreement"):
        if (estimate := scores[name]) is not None:
            table.add_row(name, f"{estimate['mean']:.4f}", f"{estimate['low']:.4f} – {estimate['high']:.4f}")
    return table


def _about(format: BlockFormat) -> str:
    rules = "|".join(SCALE_RULES[format.scale_element])
    return f"{format.bits_per_element:g} bits per element; :block={format.block},scale={rules},rounding=even|away"


def _settings(pairs: list[str]) -> dict[str, str]:
    """Raises: LatmixError: not key=value."""
    for pair in pairs:
        if "=" not in pair:
            raise LatmixError(f"--set takes key=value, not '{pair}'.")
    return dict((pair.partition("=")[0], pair.partition("=")[2]) for pair in pairs)


class TerminalProgress(Progress):
    """One bar a stage, on standard error."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Bar(
            *columns,
            TimeRemainingColumn(),
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


def main() -> None:
    """Exit codes: 0 done, 2 bad input or usage, 130 interrupted."""
    transformers.utils.logging.disable_progress_bar()  # ours is the only bar
    try:
        app()
    except LatmixError as error:
        print(f"latmix: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
