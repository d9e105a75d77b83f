"""Presets: functions that return a `Recipe`. To add one, write it here or in a file of its own and register it."""

from collections.abc import Callable
from pathlib import Path

from latmix.errors import LatmixError
from latmix.recipe import Learning, Recipe, from_json
from latmix.registry import Registry

RECIPES: Registry[Callable[[], Recipe]] = Registry("recipe")

ONLINE = {"down": "block-hadamard"}  # the one online operation of every rotated recipe here: T3


def preset(make: Callable[[], Recipe]) -> Callable[[], Recipe]:
    RECIPES.add(make.__name__.replace("_", "-"), make)
    return make


@preset
def rtn() -> Recipe:
    """Round to nearest: no calibration, no transform."""
    return Recipe("rtn", quantizer="rtn")


@preset
def gptq() -> Recipe:
    """GPTQ on the MX grid, no transform."""
    return Recipe("gptq")


@preset
def quarot() -> Recipe:
    """Randomised Hadamard on the whole stream, Hadamard on the values, online at down; GPTQ (2404.00456)."""
    return Recipe("quarot", folded={"residual": "hadamard", "values": "hadamard"}, online={"down": "hadamard"})


@preset
def block_hadamard() -> Recipe:
    """Hadamard within each MX block, on the stream and the values, folded; online at down; GPTQ."""
    return Recipe("block-hadamard", folded={"residual": "block-hadamard", "values": "block-hadamard"}, online=ONLINE)


@preset
def latmix_lu() -> Recipe:
    """Learned affine maps in LU form on stream and values; online block-Hadamard at down; GPTQ (2602.17681)."""
    return _latmix("lu")


@preset
def latmix_qr() -> Recipe:
    """As latmix-lu, in QR form (2602.17681)."""
    return _latmix("qr")


def _latmix(form: str) -> Recipe:
    shifted = f"{form}:shift=full"
    return Recipe(f"latmix-{form}", folded={"residual": shifted, "values": shifted}, online=ONLINE, learning=Learning())


def find(name_or_file: str | Recipe) -> Recipe:
    """A recipe by preset name or from a JSON file.

    Raises: LatmixError: neither; lists the presets.
    """
    if isinstance(name_or_file, Recipe):
        return name_or_file
    if name_or_file in RECIPES:
        return RECIPES[name_or_file]()
    if (path := Path(name_or_file)).is_file():
        try:
            return from_json(path.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise LatmixError(f"The recipe file '{path}' is not UTF-8 text.") from error
    raise LatmixError(f"Unknown recipe '{name_or_file}'; known: {', '.join(RECIPES)}, or a JSON file.")


__all__ = ["RECIPES", "find", "preset"]
