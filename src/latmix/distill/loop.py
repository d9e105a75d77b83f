"""Distillation: a student learns to give the unquantized model's distribution over the next token, or to predict it.

Who the student is, what of it learns and what must hold after a step is a `Student`'s business; the loop knows batches,
the schedule and the held-out windows, and leaves the student at the step that did best on those. The teacher is asked
once (`answers`). Given up: schedules other than the cosine, and optimizers other than Adam.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from latmix import ranks, sharding
from latmix.distill.answers import BATCH, Answers, asked, logits_of
from latmix.distill.average import Average, parameters
from latmix.distill.objective import divergence, learning_rate, objective
from latmix.distill.runaway import check_held_out, diverged
from latmix.distill.snapshot import Course, Step, identity, load, save
from latmix.distill.student import Student
from latmix.distill.teacher import Teacher
from latmix.errors import InputError
from latmix.progress import Progress
from latmix.recipe import Distillation

KEEP_EVERY = 60.0
"""Seconds after which a snapshot is written, besides those with each measurement."""


@torch.no_grad()
def mean_divergences(
    answers: Answers, student: Student, windows: Int[Tensor, "windows window"]
) -> Float[Tensor, " windows"]:
    """Mean KL over the positions of each of the windows, which the answers are to."""
    found = list[Tensor]()
    with student.evaluated_once():
        for rows in torch.arange(len(windows)).split(BATCH * ranks.world()):
            own = ranks.own(rows)
            got = logits_of(student.model, windows[own], answers.compute)
            found.append(ranks.gathered(divergence(answers.logits(own), got).mean(-1), len(rows)).cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class _Stage:
    """What stays as it is over all steps.

    numbers: which windows of the caller these are. order: the rows that each step sees. average: None: none is taken.
    """

    student: Student
    windows: Int[Tensor, "windows window"]
    numbers: Int[Tensor, " windows"]
    order: Int[Tensor, "steps batch"]
    answers: Answers | None
    schedule: Distillation
    optimizer: torch.optim.Optimizer
    average: Average | None

    def step(self, course: Course) -> tuple[float, float, float]:
        """Take the next step; its loss, its rate and the norm of its gradient."""
        rows, rate = self.order[course.step], learning_rate(course.step + 1, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss = float(self._losses(ranks.own(rows)[None]).mean())
        if not math.isfinite(loss):
            raise diverged(f"the loss of windows {self._broken(rows)} is {loss}", course, self.schedule)
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        gradients = [each.grad for each in parameters if each.grad is not None]
        ranks.average(gradients)
        norm = float(sharding.total_norm(gradients))
        if not math.isfinite(norm):
            raise diverged(f"the norm of the gradient is {norm}", course, self.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.student.stepped((course.step + 1) / self.schedule.steps)
        if self.average is not None:
            self.average.take(course.step + 1)
        return loss, rate, norm

    def settled(self) -> contextlib.AbstractContextManager[object]:
        """Within, the student is what would be kept of it."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _broken(self, rows: Int[Tensor, " batch"]) -> str:
        """Which windows of a batch have a loss that is no number."""
        broken = ~self._losses(ranks.own(rows)[:, None])[: len(rows)].isfinite().cpu()
        return ", ".join(map(str, sorted(self.numbers[rows[broken]].tolist())))

    def _losses(self, own: Int[Tensor, "parts rows"]) -> Float[Tensor, " all_parts"]:
        """The loss of each part of this rank's rows, then the next rank's; gradients accumulate."""
        losses = [accumulate(self.student, self.answers, self.windows, rows, self.schedule) for rows in own]
        return ranks.gathered(
            torch.tensor(losses, device=sharding.computes_on(self.student.model)), len(own) * ranks.world()
        )


def distill(
    student: Student,
    teacher: Teacher,
    windows: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    schedule: Distillation,
    seed: int,
    on_step: Callable[[Step], None],
    snapshot: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Learn in place, leaving the student at its best held-out step (step 0, untouched, included), or where the mean of
    its steps is kept at the latest that is no worse beyond doubt (`Course.accepts`).

    teacher: loaded when it is to be asked, and dismissed before the first step.
    snapshot: where the stage is kept while it runs, for the next call to go on from; its folder also keeps the
        teacher's answers. Steps taken before are reported to `on_step` again. None: nothing is written.
    progress: told of asking the teacher, and of every step that is taken here.

    Where several processes learn together (`ranks`), all call this alike and see the snapshot's folder.

    Cost: one forward of the teacher for every window that has no answer yet, and per step one forward and backward of
        the student.
    Raises:
        InputError: the batch does not divide over the processes.
        DivergedError: the student is left at its best step, and the snapshot is there.
        LatmixError: the snapshot is of other steps or damaged, or cannot be written (`snapshot`).
    """
    if schedule.batch % ranks.world():
        raise InputError(f"A batch of {schedule.batch} windows cannot be shared out over {ranks.world()} processes.")
    optimizer = torch.optim.Adam(student.groups(), betas=(0.9, 0.95))
    name = identity(schedule, seed, windows=windows, held_out=held_out)
    course = None if snapshot is None else load(snapshot, name, student.learned, optimizer)
    folder = None if snapshot is None else snapshot.parent
    used, order = _order(len(windows), schedule, seed).unique(return_inverse=True)
    answers, others = asked(teacher, windows, used, held_out, schedule, folder, progress)
    measure = partial(mean_divergences, others, student, held_out)
    if course is None:
        start, learned = measure(), student.learned
        first, kl = parameters(learned) if schedule.average else {}, float(start.mean())
        course = Course([Step(0, kl, 0.0, 0.0, 0.0, kl)], copy.deepcopy(learned.state_dict()), first, start)
    average = Average(student.learned, course.average) if schedule.average else None
    stage = _Stage(student, windows[used], used, order, answers, schedule, optimizer, average)
    for step in course.curve:
        on_step(step)
    progress = progress or Progress()
    progress.stage(schedule.key, schedule.steps, course.step)
    keep = None if snapshot is None else partial(save, snapshot, name, course, student.learned, optimizer)
    try:
        _prepare(student.model, schedule)
        _run(stage, course, measure, on_step, progress, keep)
    finally:
        student.learned.load_state_dict(course.best_state)
        student.model.eval()


def _run(
    stage: _Stage,
    course: Course,
    measure: Callable[[], Tensor],
    on_step: Callable[[Step], None],
    progress: Progress,
    keep: Callable[[], None] | None,
) -> None:
    """All steps that are left."""
    began, kept = time.perf_counter() - course.curve[-1].seconds, time.perf_counter()
    while course.step < stage.schedule.steps:
        loss, rate, norm = stage.step(course)
        number = course.step + 1
        held_out = None
        if number % stage.schedule.evaluate_every == 0 or number == stage.schedule.steps:
            with stage.settled():
                found = measure()
                held_out = float(found.mean())
                if course.accepts(found):
                    course.best_state = copy.deepcopy(stage.student.learned.state_dict())
        course.curve.append(Step(number, loss, rate, norm, time.perf_counter() - began, held_out))
        on_step(course.curve[-1])
        progress.advance("" if held_out is None else f"held-out KL {held_out:.4f}")
        check_held_out(course, stage.schedule)
        if keep is not None and (held_out is not None or ranks.agreed(time.perf_counter() - kept > KEEP_EVERY)):
            keep()
            kept = time.perf_counter()


def _prepare(model: PreTrainedModel, schedule: Distillation) -> None:
    if schedule.checkpointing:
        # transformers 5.17 knows only the second name, later versions warn about it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()  # transformers checkpoints in training mode only; these families have no active dropout


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
            target = None if answers is None else answers.logits(part)
            got = logits_of(student.model, windows[part], schedule.compute)
            loss = objective(got, windows[part].to(got.device), target, schedule.top_k) / len(parts)
            penalized = loss + student.penalty() / len(parts)
            penalized.backward(retain_graph=part is not parts[-1])  # the parts may share a graph
            total += float(loss.detach())
    return total
