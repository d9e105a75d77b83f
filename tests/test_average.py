"""The average of what a stage learned: late steps weigh more, and the last step is back when it has been looked at."""

import pytest
import torch
from torch import nn

from latmix.distill.average import Average, parameters
from latmix.distill.snapshot import Course


def test_a_step_weighs_more_than_the_one_before_it() -> None:
    """Shamir & Zhang (1212.1824): weights t (t + 1) (t + 2), for η = 3."""
    module = nn.Linear(3, 2)
    values = parameters(module)
    average, seen = Average(module, values), []
    for step in range(1, 41):
        nn.init.normal_(module.weight)
        seen.append(module.weight.detach().clone())
        average.take(step)
    weights = torch.tensor([step * (step + 1.0) * (step + 2.0) for step in range(1, 41)])
    expected = (weights[:, None, None] * torch.stack(seen)).sum(0) / weights.sum()
    torch.testing.assert_close(values["weight"], expected)
    assert weights[30:].sum() / weights.sum() > 0.6  # the last quarter


def test_the_last_step_is_there_again_after_a_look_at_the_average() -> None:
    module = nn.Linear(3, 2)
    average = Average(module, values := parameters(module))
    before = module.weight.detach().clone()
    nn.init.zeros_(module.weight)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert torch.equal(module.weight, before)
        raise ZeroDivisionError
    assert not module.weight.any() and torch.equal(values["weight"], before)


def test_a_mean_is_kept_unless_it_is_worse_beyond_doubt_and_a_step_if_it_is_the_lowest() -> None:
    windows, noise = torch.rand(16), torch.randn(16)
    noise -= noise.mean()
    steps, means = (Course([], {}, average, windows) for average in ({}, {"a": torch.zeros(1)}))
    higher = windows + 0.001 + 0.002 * noise / noise.std()  # two standard errors
    assert means.accepts(higher) and not steps.accepts(higher)
    assert torch.equal(means.lowest, windows)  # what is compared with stays the lowest
    for course in (steps, means):
        assert not course.accepts(windows + 0.005 + 0.002 * noise / noise.std())
        assert not course.accepts(torch.full((16,), torch.nan))
        assert course.accepts(windows - 0.001) and torch.equal(course.lowest, windows - 0.001)
