"""KL distillation to the unquantized model: of the maps before the weights are quantized, of what is free after."""

from latmix.distill.answers import Answers
from latmix.distill.generate import generated
from latmix.distill.loop import accumulate, mean_divergences
from latmix.distill.maps import Mapped, learn, volume
from latmix.distill.objective import divergence, learning_rate, objective
from latmix.distill.snapshot import Step
from latmix.distill.student import Student
from latmix.distill.teacher import Teacher
from latmix.distill.tune import tune

__all__ = [
    "Answers",
    "Mapped",
    "Step",
    "Student",
    "Teacher",
    "accumulate",
    "divergence",
    "generated",
    "learn",
    "learning_rate",
    "mean_divergences",
    "objective",
    "tune",
    "volume",
]
