"""The baselines without a transform, and block-Hadamard: what everything else is measured against."""

from latmix.recipe import Recipe
from latmix.recipes.registry import preset


@preset
def rtn() -> Recipe:
    """Round to nearest: no calibration, no transform."""
    return Recipe("rtn", quantizer="rtn")


@preset
def gptq() -> Recipe:
    """GPTQ on the MX grid, no transform."""
    return Recipe("gptq")


@preset
def block_hadamard() -> Recipe:
    """Hadamard within each MX block, on the stream and the values, folded; online at down; GPTQ."""
    return Recipe(
        "block-hadamard",
        folded={"residual": "block-hadamard", "values": "block-hadamard"},
        online={"down": "block-hadamard"},
    )
