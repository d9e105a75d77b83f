"""Tuning after quantization: what is free at inference learns to make up for what rounding did.

The weights stand on their grid, the activations are rounded as they will be, and the loss is the model's own KL: no
layer-wise proxy is left. Source of the idea: norm and bias tuning of quantized networks (Norm Tweaking, 2309.02784) and
learned rounding (AdaRound, 2004.10568), here end to end on KL and on MX codes.

A weight whose best value lies between two numbers of the grid makes its code go to and fro, and all the others learn
beside that noise. So latents are drawn back to their codes, more and more of them come to rest, and the rest make up
for where they do (dampening, 2203.11086).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from latmix import sharding
from latmix.distill.loop import distill
from latmix.distill.snapshot import Step
from latmix.distill.student import Student
from latmix.distill.teacher import Teacher
from latmix.model.free import Free
from latmix.progress import Progress
from latmix.recipe import Tuning

UNDAMPED = 0.3
"""Share of the steps in which latents are not drawn back; from there on more in every step."""


class Freed(Student):
    """A quantized model whose free parts learn; codes at a rate of their own."""

    def __init__(self, model: PreTrainedModel, parts: Free, tuning: Tuning) -> None:
        self.model, self.learned, self._parts, self._tuning = model, parts, parts, tuning

    def groups(self) -> list[dict[str, Any]]:
        parts, tuning = self._parts, self._tuning
        kept = [{"params": [part], "rate": _size(part)} for part in parts.kept.values()]
        latents = [{"params": list(parts.latents.values()), "rate": tuning.codes_lr / tuning.lr}]
        return kept + latents[: len(parts.latents)]

    def stepped(self, done: float) -> None:
        growing = max(0.0, (done - UNDAMPED) / (1 - UNDAMPED))
        self._parts.constrain(self._tuning.damping * growing)


def tune(
    model: PreTrainedModel,
    parts: Free,
    teacher: Teacher,
    windows: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    tuning: Tuning,
    seed: int,
    on_step: Callable[[Step], None],
    snapshot: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Tune the free parts of a quantized model in place.

    Cost: as `distill`; with codes, Adam's two moments and six more copies of every quantized weight.
    """
    distill(Freed(model, parts, tuning), teacher, windows, held_out, tuning, seed, on_step, snapshot, progress)


def _size(part: Tensor) -> float:
    """What a rate is relative to: the root mean square of a matrix; one for gains and biases.

    A step of Adam has the size of its rate, whatever the gradient: the head of a large model, whose entries are near
    0.02, would lose in a step of 0.002 a tenth of what it knows.
    """
    return float(sharding.whole(part.detach()).square().mean().sqrt()) if part.dim() == 2 else 1.0
