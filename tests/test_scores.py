"""Scores: what is kept of each batch's logits is a few numbers a token, and nothing else stays in memory."""

from pathlib import Path

import pytest
import torch

from latmix.eval.scores import Scoring

STATUS = Path("/proc/self/status")


def resident() -> int:
    """MiB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) >> 10


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_text() -> None:
    """Logits of a few MiB come from the heap: a small result that outlives them would keep the next from their place."""
    batches, tokens, vocabulary = 50, 63, 16_384
    scoring = Scoring(torch.zeros(batches, tokens + 1, dtype=torch.long))
    for index in range(batches):
        if index == 10:
            before = resident()
        scoring.add(torch.ones(tokens, vocabulary), torch.zeros(tokens, vocabulary))
    assert resident() - before < 64  # all the logits are 390
    assert scoring.scores().perplexity.mean == pytest.approx(vocabulary, rel=1e-4)
