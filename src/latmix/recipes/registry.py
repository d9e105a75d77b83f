"""Where recipes register."""

from collections.abc import Callable

from latmix.recipe import Recipe
from latmix.registry import Registry

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")


def preset(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Register the function under its name, dashes for underscores."""
    RECIPES.add(make.__name__.replace("_", "-"), make)
    return make
