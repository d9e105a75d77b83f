"""list: what latmix knows by name."""

import inspect
from enum import StrEnum
from typing import Annotated

import rich
import typer
from rich.table import Table

from latmix import archs, errors, recipes, transforms
from latmix.cli.app import app
from latmix.numerics import FORMATS, SCALE_RULES, BlockFormat


class Kind(StrEnum):
    recipes = "recipes"
    formats = "formats"
    transforms = "transforms"
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
        Kind.architectures: [(name, arch.causal_lm) for name, arch in archs.ARCHS.items()],
        Kind.errors: [(kind.__name__, _how(kind)) for kind in errors.tree()],
    }
    for section in [kind] if kind else list(Kind):
        table = Table(title=section.value, show_header=False, title_justify="left")
        for name, text in rows[section]:
            table.add_row(name, text.partition("\n")[0])
        rich.print(table)


def _about(format: BlockFormat) -> str:
    rules = "|".join(SCALE_RULES[format.scale_element])
    return f"{format.bits_per_element:g} bits per element; :block={format.block},scale={rules},rounding=even|away"


def _how(kind: type[errors.LatmixError]) -> str:
    line, cause, remedy = errors.explained(kind)
    return f"{line} Cause: {cause} Remedy: {remedy} Exit code {kind.exit_code}."
