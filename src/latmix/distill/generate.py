"""Text that the unquantized model writes itself, to learn from more than the calibration text holds (2305.17888).

A window begins as one of the calibration text does, up to a place drawn from its first half, and goes on token by token
as the model would: drawn from all of its vocabulary, at a temperature a little below one, since what a small model
thinks unlikely is mostly nonsense (docs/log.md). End-of-text tokens are words like others. Given up: `generate` of
transformers, whose results hang on settings that checkpoints bring along.
"""

import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from latmix import ranks, sharding
from latmix.distill.answers import computing
from latmix.distill.kept import kept, name_of
from latmix.distill.teacher import Teacher
from latmix.errors import FailedError
from latmix.progress import Progress

BATCH = 64  # windows that are written together
TEMPERATURE = 0.9
FILE = "generated"


def generated(
    teacher: Teacher,
    windows: Int[Tensor, "windows window"],
    count: int,
    seed: int,
    compute: str,
    folder: Path,
    progress: Progress | None = None,
) -> Int[Tensor, "{count} window"]:
    """So many windows; every window given begins as many of them as any other, or one more.

    folder: whose disk keeps them, batch by batch, for whoever asks the same again.
    compute: of the recipe.
    progress: told of every batch.

    Cost: `window` forwards of one token for each batch, with its keys and values in memory.
    Raises:
        FailedError: the model gives NaN or infinity.
        WriteError: the disk has no room for them.
    """
    if count == 0:
        return windows[:0]
    file = folder / f"{FILE}.{name_of(teacher.digest, count, seed, compute, TEMPERATURE, windows=windows)}"
    write = partial(_write, teacher, windows, count, seed, compute, progress or Progress())
    return kept(file, (count, windows.shape[1]), windows.dtype, BATCH, write)


@torch.no_grad()
def _write(
    teacher: Teacher,
    windows: Int[Tensor, "windows window"],
    count: int,
    seed: int,
    compute: str,
    progress: Progress,
    begin: int,
) -> Iterator[Int[Tensor, "batches window"]]:
    """The windows from `begin` on, a batch for each rank at a time."""
    if begin >= count:
        return
    model, together = teacher.model, BATCH * ranks.world()
    every = torch.arange(begin, count).split(together)
    progress.stage("generate", begin // together + len(every), begin // together)
    for rows in every:
        own = rows[ranks.rank() * BATCH :][:BATCH]
        own = torch.cat([own, rows[:1].expand(BATCH - len(own))])  # all have the same to do, together
        made = _gone_on(model, windows[own % len(windows)], hash((seed, int(own[0]))), compute)
        yield ranks.gathered(made, together)[: len(rows)].cpu().contiguous()
        progress.advance()


def _gone_on(
    model: PreTrainedModel, windows: Int[Tensor, "batch window"], seed: int, compute: str
) -> Int[Tensor, "batch window"]:
    """Windows that begin as these do. Given tokens are fed one by one too: so ranks take the same steps."""
    count, length = windows.shape
    device = sharding.computes_on(model)
    generator = torch.Generator(device).manual_seed(seed)
    given = torch.randint(1, 1 + (length + 1) // 2, (count, 1), generator=generator, device=device)
    # transformers 5.17 knows only the second name, later versions warn about it
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache, ids = {name: DynamicCache(config=model.config)}, windows.to(device, copy=True)
    for at in range(1, length):
        with computing(device, compute):
            logits = model(ids[:, at - 1 : at], **cache, use_cache=True).logits[:, -1].float()
        if not logits.isfinite().all():
            raise FailedError("The unquantized model gives NaN or infinity on text that it writes itself.")
        sums = (logits / TEMPERATURE).softmax(-1).cumsum(-1)  # multinomial takes twenty times as long
        drawn = torch.searchsorted(sums, sums[:, -1:] * torch.rand(count, 1, generator=generator, device=device))
        ids[:, at : at + 1] = torch.where(at < given, ids[:, at : at + 1], drawn)
    return ids
