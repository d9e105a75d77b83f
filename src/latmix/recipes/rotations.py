"""Recipes that rotate: QuaRot, SpinQuant, BRQ, OSTQuant."""

import dataclasses

from latmix.recipe import Learning, Recipe
from latmix.recipes.registry import preset

HADAMARD_AT_DOWN = {"down": "hadamard"}


@preset
def quarot() -> Recipe:
    """Randomised Hadamard on the whole stream, Hadamard on the values, online at down; GPTQ (2404.00456)."""
    return Recipe("quarot", folded={"residual": "hadamard", "values": "hadamard"}, online=HADAMARD_AT_DOWN)


@preset
def quarot_rtn() -> Recipe:
    """As quarot, weights rounded to nearest (2404.00456)."""
    return dataclasses.replace(quarot(), name="quarot-rtn", quantizer="rtn")


@preset
def spinquant() -> Recipe:
    """Rotations of stream and values learned on cross-entropy; Hadamard online at down; GPTQ (2405.16406).

    As published: from a random Hadamard matrix, 100 steps, the weights at full precision while learning (section 4.2,
    since GPTQ follows). Not as published: Adam on the exponential of a skew matrix instead of Cayley SGD, at a rate
    chosen on calibration text (docs/log.md, 2026-11-24), and the step that is kept is the best by held-out
    divergence, as in every learned recipe here.
    """
    rotation = "rotation:init=random-hadamard"
    return Recipe(
        "spinquant",
        folded={"residual": rotation, "values": rotation},
        online=HADAMARD_AT_DOWN,
        learning=Learning(objective="cross-entropy", steps=100, lr=1e-2, weights=False),
    )


@preset
def brq() -> Recipe:
    """As spinquant, with rotations inside the MX blocks only, online ones too; GPTQ (2511.04214)."""
    rotation = "block-rotation"
    return dataclasses.replace(
        spinquant(), name="brq", folded={"residual": rotation, "values": rotation}, online={"down": "block-hadamard"}
    )


@preset
def ostquant() -> Recipe:
    """Learned rotations, and learned scales in norms, values and MLP, on KL over the top 1000; GPTQ (2501.13987)."""
    return Recipe(
        "ostquant",
        folded={
            "residual": "rotation:init=random-hadamard",
            "values": "scaled-rotation:init=random-hadamard",
            "attention_norm": "diagonal",
            "mlp_norm": "diagonal",
            "up": "diagonal",
        },
        online=HADAMARD_AT_DOWN,
        learning=Learning(top_k=1000),
    )
