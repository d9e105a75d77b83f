"""The teacher's answers: its distribution over the next token on every window, computed once for all epochs.

What is kept is the hidden state that its head reads, not the logits: with 4096 numbers a token instead of 128,000 it is
as small as a list of the thousand likeliest tokens, and gives the whole distribution, or its top k, without a loss. The
head is applied again at each use. Given up: the head's share of the teacher's forward, a few per cent for large models.

In a folder they outlive the process (`latmix.distill.kept`), in a file whose name says what was asked of whom and how:
who asks the same again reads them, be it a stage that goes on or the next one; who asks anything else finds nothing.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from latmix import ranks, sharding
from latmix.distill.kept import kept, name_of
from latmix.distill.teacher import Teacher
from latmix.errors import FailedError
from latmix.progress import Progress
from latmix.recipe import COMPUTE, Distillation

BATCH = 8  # windows in a forward
FILE = "answers"


class Answers:
    """What an unquantized model says of these windows.

    Args:
        folder: whose disk keeps the hidden states, for whoever asks the same again; the first rank writes, all read.
            None: they stay in memory.
        compute: of the recipe.
        progress: told of every batch.
        numbers: which windows of the caller these are; they are counted from zero unless given.

    Cost: one forward of every window that is not answered yet, for which the teacher is loaded; windows · window ·
        hidden size numbers in the dtype of the products; of what is answered, one pass over the file.

    Raises:
        FailedError: the model gives NaN or infinity; names the first such window.
        WriteError: the disk has no room for them; those that it had room for stay.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: Teacher,
        windows: Int[Tensor, "windows window"],
        folder: Path | None = None,
        compute: str = COMPUTE[0],
        progress: Progress | None = None,
        numbers: Int[Tensor, " windows"] | None = None,
    ) -> None:
        self.compute, self._head = compute, teacher.head
        dtype = torch.bfloat16 if compute == "bfloat16" else teacher.head.weight.dtype
        shape = (len(windows), windows.shape[1], teacher.head.in_features)
        numbers = torch.arange(len(windows)) if numbers is None else numbers
        ask = partial(_ask, teacher, windows, numbers, compute, dtype, progress or Progress())
        if folder is None:
            self._hidden = torch.cat([*ask(0)])
        else:
            file = folder / f"{FILE}.{name_of(teacher.digest, shape, compute, dtype, windows=windows)}"
            self._hidden = kept(file, shape, dtype, BATCH, ask)

    @torch.no_grad()
    def logits(self, rows: Int[Tensor, " batch"]) -> Float[Tensor, "batch window vocabulary"]:
        """Of these windows, on the model's device, in float32 or wider."""
        device = sharding.computes_on(self._head)
        with computing(device, self.compute):
            return _wide(self._head(self._hidden[rows].to(device)))


def _ask(
    teacher: Teacher,
    windows: Int[Tensor, "windows window"],
    numbers: Int[Tensor, " windows"],
    compute: str,
    dtype: torch.dtype,
    progress: Progress,
    begin: int,
) -> Iterator[Float[Tensor, "batch window hidden"]]:
    """What the head would read, from window `begin` on, a batch for each rank at a time; ranks ask together."""
    if begin >= len(windows):
        return
    model, step = teacher.model, BATCH * ranks.world()
    device = sharding.computes_on(model)
    batches = torch.arange(begin, len(windows)).split(step)
    progress.stage("ask the teacher", begin // step + len(batches), begin // step)
    for rows in batches:
        with computing(device, compute):
            found = model.base_model(windows[ranks.own(rows)].to(device), use_cache=False).last_hidden_state
        hidden = ranks.gathered(found, len(rows))
        if not (finite := hidden.isfinite().flatten(1).all(1)).all():
            first = int(numbers[rows[~finite.cpu()]][0])
            raise FailedError(f"The unquantized model gives NaN or infinity on window {first}.")
        yield hidden.to("cpu", dtype).contiguous()
        progress.advance()


def asked(
    teacher: Teacher,
    windows: Int[Tensor, "learn window"],
    used: Int[Tensor, " used"],
    held_out: Int[Tensor, "held_out window"],
    schedule: Distillation,
    folder: Path | None,
    progress: Progress | None,
) -> tuple[Answers | None, Answers]:
    """The answers to the windows that are used, if the objective needs them, and to the held-out ones; then the teacher
    is dismissed."""
    ask = partial(Answers, teacher, folder=folder, compute=schedule.compute, progress=progress)
    found = ask(windows[used], numbers=used) if schedule.objective == "kl" else None, ask(held_out)
    teacher.dismiss()
    return found


def logits_of(
    model: PreTrainedModel, ids: Int[Tensor, "batch window"], compute: str
) -> Float[Tensor, "batch window vocabulary"]:
    """In float32 or wider, on the model's device."""
    device = sharding.computes_on(model)
    with computing(device, compute):
        return _wide(model(ids.to(device), use_cache=False).logits)


def computing(device: torch.device, compute: str) -> torch.autocast:
    """Within, matrix products of activations are in that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute == "bfloat16")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype == torch.bfloat16 else logits
