"""The teacher's answers: its distribution over the next token on every window, computed once for all epochs.

What is kept is the hidden state that its head reads, not the logits: with 4096 numbers a token instead of 128,000 it is
as small as a list of the thousand likeliest tokens, and gives the whole distribution, or its top k, without a loss. The
head is applied again at each use. Given up: the head's share of the teacher's forward, a few per cent for large models.
"""

import gc
import math
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from latmix import ranks
from latmix.errors import FailedError, WriteError
from latmix.progress import Progress
from latmix.recipe import COMPUTE, Distillation

BATCH = 8  # windows in a forward


class Answers:
    """What an unquantized model says of these windows.

    Args:
        scratch: a folder whose disk keeps the hidden states, in a file without a name that is gone with this object;
            None: they stay in memory.
        compute: of the recipe.
        progress: told of every batch.

    Cost: one forward of every window; windows · window · hidden size numbers in the dtype of the products.

    Raises:
        FailedError: the model gives NaN or infinity; names the first such window.
        WriteError: the disk has no room for them.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: PreTrainedModel,
        windows: Int[Tensor, "windows window"],
        scratch: Path | None = None,
        compute: str = COMPUTE[0],
        progress: Progress | None = None,
    ) -> None:
        progress = progress or Progress()
        self.compute, self._head = compute, teacher.get_output_embeddings()
        dtype = torch.bfloat16 if compute == "bfloat16" else teacher.dtype
        self._hidden = _room((*windows.shape, teacher.config.hidden_size), dtype, scratch)
        batches = torch.arange(len(windows)).split(BATCH * ranks.world())
        progress.stage("ask the teacher", len(batches))
        for rows in batches:
            ids = windows[ranks.own(rows)].to(teacher.device)
            with computing(teacher.device, compute):
                found = teacher.base_model(ids, use_cache=False).last_hidden_state
            hidden = ranks.gathered(found, len(rows))
            if not (finite := hidden.isfinite().flatten(1).all(1)).all():
                first = int(rows[~finite.cpu()][0])
                raise FailedError(f"The unquantized model gives NaN or infinity on calibration window {first}.")
            self._hidden[rows] = hidden.to(self._hidden)
            progress.advance()

    @torch.no_grad()
    def logits(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch window vocabulary"]:
        """Of these windows, on the model's device, in float32 or wider."""
        device = self._head.weight.device
        with computing(device, self.compute):
            return _wide(self._head(self._hidden[rows].to(device)))


def asked(
    teacher: Callable[[], PreTrainedModel],
    windows: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    schedule: Distillation,
    scratch: Path | None,
    progress: Progress | None,
) -> tuple[Answers | None, Answers]:
    """The answers to the windows that are learned from, if the objective needs them, and to the held-out ones; then the
    teacher is gone, unless somebody else holds it."""
    ask = partial(Answers, teacher(), scratch=scratch, compute=schedule.compute, progress=progress)
    found = ask(windows) if schedule.objective == "kl" else None, ask(held_out)
    del ask
    gc.collect()  # a model in parts is full of cycles
    return found


def logits_of(
    model: PreTrainedModel, ids: Int[Tensor, "batch window"], compute: str
) -> Float[Tensor, "batch window vocabulary"]:
    """In float32 or wider, on the model's device."""
    with computing(model.device, compute):
        return _wide(model(ids.to(model.device), use_cache=False).logits)


def computing(device: torch.device, compute: str) -> torch.autocast:
    """Within, matrix products of activations are in that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute == "bfloat16")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def _room(shape: tuple[int, ...], dtype: torch.dtype, scratch: Path | None) -> Tensor:
    if scratch is None:
        return torch.empty(shape, dtype=dtype)
    count = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=scratch) as file:
            # a mapped file that finds no room when it is written to kills the process; here it is an error
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        raise WriteError(f"The teacher's answers do not fit into '{scratch}': {error.strerror}.") from error
