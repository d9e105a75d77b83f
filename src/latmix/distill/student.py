"""Who learns."""

import contextlib
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class Student(ABC):
    """A model that is learning.

    Attributes:
        model: runs forward; gradients reach what learns.
        learned: the module whose state is kept from the best step.
    """

    model: PreTrainedModel
    learned: nn.Module

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups; "rate" is a group's learning rate in units of the schedule's."""

    def penalty(self) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def evaluated_once(self) -> contextlib.AbstractContextManager[object]:
        """Within, what depends on the learned parameters alone may be computed once."""
        return contextlib.nullcontext()

    def stepped(self, done: float) -> None:
        """Called after each optimizer step: the place for constraints. done: the share of all steps, up to 1."""
        return None
