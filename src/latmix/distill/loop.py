"""Distillation: a student learns to give the unquantized model's distribution over the next token, or to predict it.

Who the student is, what of it learns and what must hold after a step is a `Student`'s business; the loop knows batches,
the schedule and the held-out windows, and leaves the student at the step that did best on those. The teacher is asked
once (`answers`). Given up: schedules other than the cosine, and optimizers other than Adam.
"""

import contextlib
import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.distill.answers import BATCH, Answers
from latmix.distill.objective import divergence, learning_rate, objective
from latmix.errors import LatmixError
from latmix.recipe import Distillation


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


@torch.no_grad()
def mean_divergence(answers: Answers, student: Student, windows: Int[Tensor, "windows window"]) -> float:
    """Mean KL over all positions of the windows, which the answers are to."""
    total = 0.0
    with student.evaluated_once():
        for rows in torch.arange(len(windows)).split(BATCH):
            got = student.model(windows[rows].to(student.model.device), use_cache=False).logits
            total += float(divergence(answers.logits(rows), got).mean(-1).sum())
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

    Cost: one forward of the teacher for every window, and per step one forward and backward of the student.
    Raises: LatmixError: the loss is not finite; names the step.
    """
    model = student.model
    if schedule.checkpointing:
        # transformers 5.17 knows only the second name, later versions warn about it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()  # transformers checkpoints in training mode only; these families have no active dropout
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.95))
    used, order = _order(len(windows), schedule, seed).unique(return_inverse=True)
    windows = windows[used]
    answers = Answers(teacher, windows) if schedule.objective == "kl" else None
    measure = partial(mean_divergence, Answers(teacher, held_out), student, held_out)
    began = time.perf_counter()
    best, best_state = measure(), copy.deepcopy(student.learned.state_dict())
    on_step(Step(0, best, 0.0, 0.0, best))
    for step in range(1, schedule.steps + 1):
        rate = learning_rate(step, schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss = accumulate(student, answers, windows, order[step - 1], schedule)
        if not math.isfinite(loss):
            raise LatmixError(f"Learning diverged at step {step} (loss {loss}); choose a smaller lr.")
        optimizer.step()
        optimizer.zero_grad()
        student.stepped()
        measured = None
        if step % schedule.evaluate_every == 0 or step == schedule.steps:
            measured = measure()
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
    student: Student,
    answers: Answers | None,
    windows: Int[Tensor, "windows window"],
    rows: Int[Tensor, " batch"],
    schedule: Distillation,
) -> float:
    """Accumulate the gradient of one step on these rows of the windows; returns its loss."""
    total = 0.0
    parts = rows.chunk(schedule.accumulation)
    with student.evaluated_once():
        for part in parts:
            ids = windows[part].to(student.model.device)
            target = None if answers is None else answers.logits(part)
            got = student.model(ids, use_cache=False).logits
            loss = objective(got, ids, target, schedule.top_k) / len(parts)
            penalized = loss + student.penalty() / len(parts)
            penalized.backward(retain_graph=part is not parts[-1])  # the parts may share a graph
            total += float(loss.detach())
    return total
