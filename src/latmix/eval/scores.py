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
from latmix.eval.kept import Kept
from latmix.progress import Progress
from latmix.sharding import computes_on

RESAMPLES, COVERAGE = 1000, 0.95
BATCH = 8  # windows in one forward
MEASURES = ("negative log-likelihood", "KL", "agreement")  # of each token; without a reference the first alone


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
    batch: int = BATCH,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Scores:
    """Cost: one forward of the model, and of the reference, per window, but for what is `kept` already."""
    scoring, batches, progress = Scoring(windows), windows.to(computes_on(model)).split(batch), progress or Progress()
    known = kept.known if kept else ()
    for found in known:
        scoring.put(found)
    progress.stage("evaluate", len(batches), len(known))
    for ids in batches[len(known) :]:
        got = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        expected = None if reference is None else reference(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        scoring.add(got, expected)
        if kept:
            kept.add(scoring.last)
        progress.advance()
    return scoring.scores()


class Scoring:
    """Scores from logits, which come for some tokens at a time: window after window, without the last token of each.

    Attributes: last: what the last call brought, a row for each measure: negative log-likelihood, and, where there is a
        reference, KL and agreement.
    """

    last: Float[Tensor, "measures tokens"]

    def __init__(self, windows: Int[Tensor, "windows window"]) -> None:
        self._following, self._windows, self._at = windows[:, 1:].flatten(), len(windows), 0
        # room for all at once: small results that outlive large logits would keep the heap from reusing their place
        self._results = torch.empty(len(MEASURES), len(self._following))

    def add(self, got: Float[Tensor, "tokens vocabulary"], expected: Float[Tensor, "tokens vocabulary"] | None) -> None:
        """expected: the reference's logits, in every call or in none."""
        self._next(len(got), 1 if expected is None else len(MEASURES))
        following = self._following[self._at - len(got) : self._at].to(got.device)
        self.last[0] = F.cross_entropy(got.float(), following, reduction="none")
        if expected is not None:
            self.last[1] = divergence(expected.float(), got.float())
            self.last[2] = (expected.argmax(-1) == got.argmax(-1)).float()

    def put(self, results: Float[Tensor, "measures tokens"]) -> None:
        """What `last` was after such tokens were added, instead of adding them."""
        self._next(results.shape[1], len(results))
        self.last[:] = results

    def _next(self, tokens: int, measures: int) -> None:
        self.last = self._results[:measures, self._at : self._at + tokens]
        self._at += tokens

    def scores(self) -> Scores:
        nll, *compared = self._results[: len(self.last)]
        kl, agreement = compared or (None, None)
        return Scores(
            perplexity=bootstrap(self._means(nll), exponential=True),
            kl=None if kl is None else bootstrap(self._means(kl)),
            top1_agreement=None if agreement is None else bootstrap(self._means(agreement.double())),
        )

    def _means(self, tokens: Float[Tensor, " tokens"]) -> Float[np.ndarray, " windows"]:
        means: np.ndarray = tokens.view(self._windows, -1).mean(1).double().numpy()
        return means
