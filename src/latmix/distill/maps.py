"""Learning the maps: the model's own weights are frozen and seen through the maps, which alone learn."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from latmix.distill.loop import distill
from latmix.distill.snapshot import Step
from latmix.distill.student import Student
from latmix.distill.teacher import Teacher
from latmix.model.attach import Attached
from latmix.progress import Progress
from latmix.recipe import Learning
from latmix.transforms import evaluated_once


class Mapped(Student):
    """A model with attached maps. Rounding passes gradients straight through, scales included (`numerics.fakequant`).

    volume: weight of the regulariser.
    """

    def __init__(self, attached: Attached, volume: float) -> None:
        self.model, self.learned, self._maps, self._volume = attached.model, attached.maps, attached.maps, volume

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self._maps.learned(), "rate": 1.0}]

    def penalty(self) -> Tensor:
        return self._volume * volume(self._maps)

    def evaluated_once(self) -> contextlib.AbstractContextManager[object]:
        return evaluated_once(self._maps)


def volume(maps: nn.Module) -> Tensor:
    """Σ over maps of (log |det A|)² / n: zero where every map keeps volumes."""
    return torch.stack([map.logabsdet() ** 2 / map.size for map in maps.each().values()]).sum()  # type: ignore[operator]


def learn(
    attached: Attached,
    teacher: Teacher,
    windows: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    learning: Learning,
    seed: int,
    on_step: Callable[[Step], None],
    snapshot: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Learn the attached maps in place (`distill`)."""
    student = Mapped(attached, learning.volume)
    distill(student, teacher, windows, held_out, learning, seed, on_step, snapshot, progress)
