"""LATMiX: learned affine maps of stream and values (2602.17681), and what can be had on top of it for free."""

import dataclasses

from latmix.recipe import Calibration, Learning, Recipe, Tuning
from latmix.recipes.registry import preset

ONLINE = {"down": "block-hadamard"}  # T3, the method's one online operation


@preset
def latmix_lu() -> Recipe:
    """Learned affine maps in LU form on stream and values; online block-Hadamard at down; GPTQ (2602.17681)."""
    return _latmix("lu")


@preset
def latmix_qr() -> Recipe:
    """As latmix-lu, in QR form (2602.17681)."""
    return _latmix("qr")


@preset
def latmix_plus() -> Recipe:
    """latmix-qr learned longer, then all that is free tuned on KL; both also on text that the model writes itself.

    Free are gains, biases, embedding, head and codes. Not published. Same format and online operation as LATMiX.
    """
    text, learning = Calibration(generated=15 * Calibration.windows), Learning(steps=600)
    return dataclasses.replace(latmix_qr(), name="latmix-plus", calibration=text, learning=learning, tuning=Tuning())


def _latmix(form: str) -> Recipe:
    shifted = f"{form}:shift=full"
    return Recipe(f"latmix-{form}", folded={"residual": shifted, "values": shifted}, online=ONLINE, learning=Learning())
