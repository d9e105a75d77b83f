"""Perplexity, divergence and agreement over full windows of text, each with a bootstrap interval over windows.

Protocol: the text is one token sequence cut into full windows without overlap; in a window each token but the first is
predicted from those before it. Perplexity is exp of the mean negative log-likelihood over all predicted
tokens; KL(reference ‖ model) in nats per predicted token; top-1 agreement is how often both predict the same token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from latmix.distill import divergence

RESAMPLES, COVERAGE = 1000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """`kl` and `top1_agreement` are None without a reference."""

    perplexity: Estimate
    kl: Estimate | None
    top1_agreement: Estimate | None


def bootstrap(values: Float[np.ndarray, " windows"], exponential: bool = False) -> Estimate:
    """Mean over windows (its exponential on request) with a percentile interval, resampling windows; seeded."""
    generator = np.random.default_rng(0)
    picks = generator.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    numbers = [float(number) for number in (values.mean(), low, high)]
    return Estimate(*(np.exp(numbers).tolist() if exponential else numbers))


@torch.no_grad()
def score(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows window"],
    reference: PreTrainedModel | None = None,
    batch: int = 8,
) -> Scores:
    """Cost: one forward of the model, and of the reference, per window."""
    nll, kl, agreement = [], [], []
    for ids in windows.to(model.device).split(batch):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        nll.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
        if reference is not None:
            expected = reference(ids, use_cache=False).logits[:, :-1].float()
            kl.append(divergence(expected, logits).mean(1))
            agreement.append((expected.argmax(-1) == logits.argmax(-1)).double().mean(1))
    return Scores(
        perplexity=bootstrap(_join(nll), exponential=True),
        kl=bootstrap(_join(kl)) if kl else None,
        top1_agreement=bootstrap(_join(agreement)) if agreement else None,
    )


def _join(parts: list[Tensor]) -> Float[np.ndarray, " windows"]:
    joined: np.ndarray = torch.cat(parts).double().cpu().numpy()
    return joined
