"""Who is learned from: the unquantized model, which is large, and its head, which is all that is needed in the end."""

import gc
from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel


class Teacher:
    """The model is there from when it is first wanted until it is dismissed, unless somebody else holds it.

    Attributes:
        head: what makes its logits of its hidden states.
        digest: which model it is, by content.

    load: the model, frozen.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], head: nn.Linear, digest: str) -> None:
        self._load, self.head, self.digest = load, head, digest
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """Where it is sharded, all ranks want it together."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def dismiss(self) -> None:
        self._model = None
        gc.collect()  # a model in parts is full of cycles
