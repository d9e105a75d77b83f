"""KL distillation to the unquantized model: of the maps before the weights are quantized, of what is free after."""

from latmix.distill.loop import Step, Student, accumulate, divergence, learning_rate, mean_divergence, objective
from latmix.distill.maps import Mapped, learn, volume
from latmix.distill.tune import tune

__all__ = [
    "Mapped",
    "Step",
    "Student",
    "accumulate",
    "divergence",
    "learn",
    "learning_rate",
    "mean_divergence",
    "objective",
    "tune",
    "volume",
]
