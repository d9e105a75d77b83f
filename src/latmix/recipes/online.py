"""Recipes with a transform at every input, at run time: MR-GPTQ, WUSH, FlatQuant. Nothing of them is pure format."""

from latmix.recipe import Layerwise, Recipe
from latmix.recipes.registry import preset

INPUTS = ("qkv", "o", "gate_up", "down")


@preset
def mr_gptq() -> Recipe:
    """Block-Hadamard online at every input; GPTQ with static scales by least squared error (2509.23202).

    Without the tensor-wide factor that the authors put before E8M0 scales, which is not the same format.
    """
    return Recipe("mr-gptq", online=dict.fromkeys(INPUTS, "block-hadamard"), quantizer="gptq:search=true")


@preset
def wush() -> Recipe:
    """Closed-form blocks online at every input, from second moments of activations and readers; GPTQ (2512.00956)."""
    return Recipe("wush", online=dict.fromkeys(INPUTS, "wush"))


@preset
def flatquant() -> Recipe:
    """Kronecker maps online at every input, learned layer by layer on squared error; GPTQ (2410.09426).

    As published: a scale per channel before each product, 15 epochs, weights in the loop. Not as published: LU factors
    instead of singular value decompositions, and no clipping thresholds, which a block format has no place for.
    """
    return Recipe("flatquant", online=dict.fromkeys(INPUTS, "scaled-kronecker"), layerwise=Layerwise())
