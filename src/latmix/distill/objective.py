"""What learning minimises, and how fast."""

import math

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from latmix.recipe import Distillation

WARMUP, FLOOR = 0.05, 0.1  # share of the steps; share of the peak rate left at the end


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
    student: Float[Tensor, "batch window vocabulary"],
    ids: Int[Tensor, "batch window"],
    teacher: Float[Tensor, "batch window vocabulary"] | None,
    top_k: int | None = None,
) -> Float[Tensor, ""]:
    """The loss of the student's logits, mean over tokens, in nats: to the teacher's, or without any to the text."""
    if teacher is None:
        return F.cross_entropy(student[:, :-1].transpose(1, 2), ids[:, 1:])
    return divergence(teacher, student, top_k).mean()
