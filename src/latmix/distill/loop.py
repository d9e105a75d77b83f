"""Distillation: a student learns to give the unquantized model's distribution over the next token, or to predict it.

Who the student is, what of it learns and what must hold after a step is a `Student`'s business; the loop knows batches,
the schedule and the held-out windows, and leaves the student at the step that did best on those. Given up: schedules
other than the cosine, and optimizers other than Adam.
"""

import contextlib
import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latmix.errors import LatmixError
from latmix.recipe import Distillation

WARMUP, FLOOR = 0.05, 0.1  # share of the steps; share of the peak rate left at the end


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

    def stepped(self) -> None:
        """Called after each optimizer step: the place for constraints."""
        return None


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


def learning_rate(step: int, schedule: Distillation) -> float:
    """Rate of step 1 … steps: linear warmup, then a cosine from the peak to `FLOOR` of it."""
    warmup = max(1, round(WARMUP * schedule.steps))
    if step <= warmup:
        return schedule.lr * step / warmup
    progress = (step - warmup) / max(1, schedule.steps - warmup)
    return schedule.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def objective(
    teacher: PreTrainedModel,
    student: Float[Tensor, "batch window vocabulary"],
    ids: Int[Tensor, "batch window"],
    schedule: Distillation,
) -> Float[Tensor, ""]:
    """The loss of the student's logits on these windows, mean over tokens, in nats."""
    if schedule.objective == "cross-entropy":
        return F.cross_entropy(student[:, :-1].transpose(1, 2), ids[:, 1:])
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits
    return divergence(target, student, schedule.top_k).mean()


@torch.no_grad()
def mean_divergence(
    teacher: PreTrainedModel, student: Student, windows: Int[Tensor, "windows window"], batch: int = 8
) -> float:
    """Mean KL over all positions of the windows."""
    total = 0.0
    with student.evaluated_once():
        for ids in windows.to(teacher.device).split(batch):
            expected, got = teacher(ids, use_cache=False).logits, student.model(ids, use_cache=False).logits
            total += float(divergence(expected, got).mean(-1).sum())
    return total / len(windows)


def distill(
    student: Student,
    teacher: PreTrainedModel,
    windows: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    schedule: Distillation,
    seed: int,
    on_step: Callable[[Step], None],
) -> None:
    """Learn in place, leaving the student at its best held-out step (step 0, untouched, included).

    Cost: per step one forward of the teacher and one forward and backward of the student.
    Raises: LatmixError: the loss is not finite; names the step.
    """
    model = student.model
    if schedule.checkpointing:
        # transformers 5.17 knows only the second name, later versions warn about it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()  # transformers checkpoints in training mode only; these families have no active dropout
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.95))
    order = _order(len(windows), schedule, seed)
    began = time.perf_counter()
    best, best_state = mean_divergence(teacher, student, held_out), copy.deepcopy(student.learned.state_dict())
    on_step(Step(0, best, 0.0, 0.0, best))
    for step in range(1, schedule.steps + 1):
        rate = learning_rate(step, schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss = accumulate(student, teacher, windows[order[step - 1]].to(teacher.device), schedule)
        if not math.isfinite(loss):
            raise LatmixError(f"Learning diverged at step {step} (loss {loss}); choose a smaller lr.")
        optimizer.step()
        optimizer.zero_grad()
        student.stepped()
        measured = None
        if step % schedule.evaluate_every == 0 or step == schedule.steps:
            measured = mean_divergence(teacher, student, held_out)
            if measured < best:
                best, best_state = measured, copy.deepcopy(student.learned.state_dict())
        on_step(Step(step, loss, rate, time.perf_counter() - began, measured))
    student.learned.load_state_dict(best_state)
    model.eval()


def _order(count: int, schedule: Distillation, seed: int) -> Int[Tensor, "steps batch"]:
    """Which windows each step sees: shuffled passes over all of them."""
    generator = torch.Generator().manual_seed(seed)
    needed = schedule.steps * schedule.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(passes)[:needed].view(schedule.steps, schedule.batch)


def accumulate(
    student: Student, teacher: PreTrainedModel, ids: Int[Tensor, "batch window"], schedule: Distillation
) -> float:
    """Accumulate the gradient of one step; returns its loss."""
    total = 0.0
    parts = ids.chunk(schedule.accumulation)
    with student.evaluated_once():
        for part in parts:
            got = student.model(part, use_cache=False).logits
            loss = objective(teacher, got, part, schedule) / len(parts)
            penalized = loss + student.penalty() / len(parts)
            penalized.backward(retain_graph=part is not parts[-1])  # the parts may share a graph
            total += float(loss.detach())
    return total
