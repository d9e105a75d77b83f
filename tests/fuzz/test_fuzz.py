"""Whatever latmix is given, it takes it or refuses it in one sentence. `benchmarks/fuzz.py` runs the campaign."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from latmix.errors import LatmixError
from tests.fuzz.targets import TARGETS, Target

CHEAP = 60
"""Inputs of a parser; a target that costs more gets fewer."""


def outcome(target: Target, data: bytes) -> str:
    """ "taken" or "refused"; anything but a LatmixError is raised."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            target.check(data, Path(folder))
        except LatmixError as error:
            assert str(error)
            return "refused"
    return "taken"


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_valid_is_taken(name: str) -> None:
    first, *others = TARGETS[name].examples()
    assert outcome(TARGETS[name], first) == "taken"
    for seed in others:
        outcome(TARGETS[name], seed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_wrong_is_refused_in_a_sentence(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=max(5, CHEAP // target.cost),
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def holds(data: bytes) -> None:
        outcome(target, data)

    holds()
