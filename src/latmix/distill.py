"""Learning the maps: KL distillation of the quantized model to the unquantized one.

Only the maps learn; the model's own weights are frozen and seen through the maps. Rounding passes gradients straight
through. The step that does best on held-out windows is kept. Given up: a learning rate per kind of parameter, schedules
other than the cosine.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.errors import LatmixError
from latmix.model.attach import Attached
from latmix.recipe import Learning
from latmix.transforms import evaluated_once

WARMUP, FLOOR = 0.05, 0.1  # share of the steps; share of the peak rate left at the end


@dataclass(frozen=True)
class Step:
    """One line of the learning curve; `held_out` (mean KL, nats a token) only where it was measured."""

    step: int
    loss: float
    lr: float
    seconds: float
    held_out: float | None = None


def divergence(
    teacher: Float[Tensor, "*batch vocabulary"], student: Float[Tensor, "*batch vocabulary"], top_k: int | None = None
) -> Float[Tensor, " *batch"]:
    """KL(teacher ‖ student) in nats per position; with `top_k`, both renormalised over the teacher's k likeliest."""
    if top_k is not None:
        teacher, likeliest = teacher.topk(min(top_k, teacher.shape[-1]))
        student = student.gather(-1, likeliest)
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum(-1)


def learning_rate(step: int, learning: Learning) -> float:
    """Rate of step 1 … steps: linear warmup, then a cosine from the peak to `FLOOR` of it."""
    warmup = max(1, round(WARMUP * learning.steps))
    if step <= warmup:
        return learning.lr * step / warmup
    progress = (step - warmup) / max(1, learning.steps - warmup)
    return learning.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def volume(maps: nn.Module) -> Tensor:
    """Σ over maps of (log |det A|)² / n: zero where every map keeps volumes."""
    return torch.stack([map.logabsdet() ** 2 / map.size for map in maps.each().values()]).sum()  # type: ignore[operator]


@torch.no_grad()
def mean_divergence(
    teacher: PreTrainedModel, attached: Attached, windows: Int[Tensor, "windows window"], batch: int = 8
) -> float:
    """Mean KL over all positions of the windows."""
    total, student = 0.0, attached.model
    with evaluated_once(attached.maps):
        for ids in windows.to(teacher.device).split(batch):
            total += float(
                divergence(teacher(ids, use_cache=False).logits, student(ids, use_cache=False).logits).mean(-1).sum()
            )
    return total / len(windows)


def learn(
    attached: Attached,
    teacher: PreTrainedModel,
    windows: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    learning: Learning,
    seed: int,
    on_step: Callable[[Step], None],
) -> None:
    """Learn the attached maps in place, leaving them at their best held-out step (step 0, untouched, included).

    Cost: per step one forward of the teacher and one forward and backward of the student.
    Raises: LatmixError: the loss is not finite; names the step.
    """
    maps, student = attached.maps, attached.model
    if learning.checkpointing:
        # transformers 5.17 knows only the second name, later versions warn about it
        getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)()
        student.train()  # transformers checkpoints in training mode only; these families have no active dropout
    optimizer = torch.optim.Adam(maps.learned(), betas=(0.9, 0.95))
    order = _order(len(windows), learning, seed)
    began = time.perf_counter()
    best, best_state = mean_divergence(teacher, attached, held_out), copy.deepcopy(maps.state_dict())
    on_step(Step(0, best, 0.0, 0.0, best))
    for step in range(1, learning.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, learning)
        loss = accumulate(attached, teacher, windows[order[step - 1]].to(teacher.device), learning)
        if not math.isfinite(loss):
            raise LatmixError(f"Learning diverged at step {step} (loss {loss}); choose a smaller learning.lr.")
        optimizer.step()
        optimizer.zero_grad()
        measured = None
        if step % learning.evaluate_every == 0 or step == learning.steps:
            measured = mean_divergence(teacher, attached, held_out)
            if measured < best:
                best, best_state = measured, copy.deepcopy(maps.state_dict())
        on_step(Step(step, loss, learning_rate(step, learning), time.perf_counter() - began, measured))
    maps.load_state_dict(best_state)
    student.eval()


def _order(count: int, learning: Learning, seed: int) -> Int[Tensor, "steps batch"]:
    """Which windows each step sees: shuffled passes over all of them."""
    generator = torch.Generator().manual_seed(seed)
    needed = learning.steps * learning.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].view(learning.steps, learning.batch)


def accumulate(
    attached: Attached, teacher: PreTrainedModel, ids: Int[Tensor, "batch window"], learning: Learning
) -> float:
    """Accumulate the gradient of one step; returns its KL loss."""
    total = 0.0
    parts = ids.chunk(learning.accumulation)
    with evaluated_once(attached.maps):
        for part in parts:
            with torch.no_grad():
                target = teacher(part, use_cache=False).logits
            student = attached.model(part, use_cache=False).logits
            loss = divergence(target, student, learning.top_k).mean() / len(parts)
            penalty = learning.volume * volume(attached.maps) / len(parts)
            (loss + penalty).backward(retain_graph=part is not parts[-1])  # the parts share the maps' own graph
            total += float(loss.detach())
    return total
