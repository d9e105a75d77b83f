"""list: what latmix knows by name."""

import dataclasses
import inspect
from enum import StrEnum
from typing import Annotated

import rich
import typer
from rich.table import Table
from rich.text import Text

from latmix import archs, errors, recipes, transforms
from latmix.cli.app import app
from latmix.numerics import FORMATS, SCALE_RULES, BlockFormat
from latmix.weights import WEIGHT_QUANTIZERS, WeightQuantizer


class Kind(StrEnum):
    recipes = "recipes"
    formats = "formats"
    transforms = "transforms"
    quantizers = "quantizers"
    architectures = "architectures"
    errors = "errors"


@app.command("list")
def list_command(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; everything unless given.")] = None,
) -> None:
    """List what latmix knows by name."""
    rows = {
        Kind.recipes: [(name, inspect.getdoc(make) or "") for name, make in recipes.RECIPES.items()],
        Kind.formats: [(name, _about(format)) for name, format in FORMATS.items()],
        Kind.transforms: [(name, inspect.getdoc(make) or "") for name, make in transforms.TRANSFORMS.items()],
        Kind.quantizers: [(name, _settings(quantizer)) for name, quantizer in WEIGHT_QUANTIZERS.items()],
        Kind.architectures: [(name, arch.causal_lm) for name, arch in archs.ARCHS.items()],
        Kind.errors: [(kind.__name__, _how(kind)) for kind in errors.tree()],
    }
    for section in [kind] if kind else list(Kind):
        table = Table(title=section.value, show_header=False, title_justify="left")
        for name, text in rows[section]:
            table.add_row(name, Text(text.partition("\n")[0]))  # no markup: `latmix[eval]` is no style
        rich.print(table)


def _about(format: BlockFormat) -> str:
    rules = "|".join(SCALE_RULES[format.scale_element])
    return f"{format.bits_per_element:g} bits per element; :block={format.block},scale={rules},rounding=even|away"


def _settings(quantizer: type[WeightQuantizer]) -> str:
    values = ",".join(f"{field.name}={field.default!s}".lower() for field in dataclasses.fields(quantizer))
    line = (inspect.getdoc(quantizer) or "").partition("\n")[0]
    return f"{line} :{values}" if values else line


def _how(kind: type[errors.LatmixError]) -> str:
    line, cause, remedy = errors.explained(kind)
    return f"{line} Cause: {cause} Remedy: {remedy} Exit code {kind.exit_code}."
