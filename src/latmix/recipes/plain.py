"""The baselines without a transform, and block-Hadamard: what everything else is measured against."""

from latmix.recipe import Recipe
from latmix.recipes.registry import preset


@preset
def rtn() -> Recipe:
    """Round to nearest, no calibration, no transform: the baseline of GPTQ's paper (2210.17323)."""
    return Recipe("rtn", quantizer="rtn")


@preset
def gptq() -> Recipe:
    """GPTQ on the MX grid, no transform (2210.17323)."""
    return Recipe("gptq")


@preset
def block_hadamard() -> Recipe:
    """Hadamard within each MX block, of stream and values, folded; online at down; GPTQ (Figure 2 of 2602.17681)."""
    return Recipe(
        "block-hadamard",
        folded={"residual": "block-hadamard", "values": "block-hadamard"},
        online={"down": "block-hadamard"},
    )
