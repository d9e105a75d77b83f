"""Scores: they do not depend on the batch, and of its logits a few numbers a token stay in memory."""

from pathlib import Path

import pytest
import torch

from latmix.eval.scores import Scoring, score
from tests.models import tiny

STATUS = Path("/proc/self/status")


def resident() -> int:
    """MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_text() -> None:
    """Logits of a few MiB come from the heap: a small result that outlives them would keep others from their place."""
    batches, tokens, vocabulary = 50, 63, 16_384
    scoring = Scoring(torch.zeros(batches, tokens + 1, dtype=torch.long))
    for index in range(batches):
        if index == 10:
            before = resident()
        scoring.add(torch.ones(tokens, vocabulary), torch.zeros(tokens, vocabulary))
    assert resident() - before < 64  # all the logits are 390
    assert scoring.scores().perplexity.mean == pytest.approx(vocabulary, rel=1e-4)


def test_the_batch_changes_nothing_but_the_order_of_sums() -> None:
    model, reference = tiny("llama"), tiny("llama", seed=1)
    windows = torch.arange(10 * 16).view(10, 16) * 37 % 96
    eight, three = (score(model, windows, reference, batch) for batch in (8, 3))
    assert three.perplexity.mean == pytest.approx(eight.perplexity.mean, rel=1e-5)
    assert eight.kl and three.kl and three.kl.mean == pytest.approx(eight.kl.mean, rel=1e-4)
