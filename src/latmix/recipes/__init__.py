"""Presets: functions that return a `Recipe`. To add one, write it in a file here and register it;
the file is imported below.

A recipe says where maps stand (`folded`: free; `online`: at run time), of which form each is, and how it is found: by
its initial value alone, in closed form (the form says so), `layerwise`, or by `learning` end to end.
"""

from pathlib import Path

from latmix.errors import InputError
from latmix.recipe import Recipe, from_json

# In the order of the table.
# isort: off
from latmix.recipes import plain
from latmix.recipes import rotations
from latmix.recipes import online
from latmix.recipes import affine

# isort: on
from latmix.recipes.registry import RECIPES, preset

DEFAULT = "latmix-plus"
"""What runs where no recipe is named."""


def find(name_or_file: str | Recipe) -> Recipe:
    """A recipe by preset name or from a JSON file.

    Raises: LatmixError: neither; lists the presets.
    """
    if isinstance(name_or_file, Recipe):
        return name_or_file
    if name_or_file in RECIPES:
        return RECIPES[name_or_file]()
    path = Path(name_or_file)
    try:
        if path.is_file():
            return from_json(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"The recipe file '{path}' is not UTF-8 text.") from error
    except OSError as error:
        raise InputError(f"The recipe file '{path}' cannot be read: {error.strerror}.") from error
    raise InputError(f"Unknown recipe '{name_or_file}'; known: {', '.join(RECIPES)}, or a JSON file.")


__all__ = ["DEFAULT", "RECIPES", "affine", "find", "online", "plain", "preset", "rotations"]
