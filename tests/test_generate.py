"""Text that the model writes: it begins as it is told, goes on as the model would, and is written once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latmix.archs import ARCHS
from latmix.distill import Teacher, generate, generated
from latmix.errors import FailedError
from tests.models import known, tiny
from tests.test_answers import Stop, gone, kept
from tests.test_progress import Told
from tests.test_resume import Killed

WINDOWS = torch.randint(96, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(generate, "BATCH", 4)
    yield


@pytest.mark.parametrize("name", ARCHS.names())
def test_every_token_is_drawn_from_the_models_own_distribution(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold enough, it is the likeliest one after all before it; where the model asks itself anew, without a cache."""
    monkeypatch.setattr(generate, "TEMPERATURE", 1e-4)
    model = tiny(name)
    found = generated(known(model), WINDOWS, 70, 0, "float32", tmp_path)
    logits = model(found).logits[:, :-1]
    likeliest = logits.gather(-1, found[:, 1:, None]).squeeze(-1) > logits.amax(-1) - 2e-3
    begun = WINDOWS[torch.arange(70) % 5] == found
    given = begun.long().cumprod(1).sum(1)  # how far each goes with the window it begins with
    assert found.shape == (70, 16) and (given >= 1).all() and set(given.tolist()) >= set(range(1, 9))
    for row, length in zip(likeliest, given.tolist(), strict=True):
        assert row[length - 1 :].all(), name


def test_how_often_a_token_is_drawn_is_its_probability(tmp_path: Path) -> None:
    model, count = tiny("llama"), 4096
    found = generated(known(model), WINDOWS[:1, :2], count, 0, "float32", tmp_path)  # one token is given
    expected = (model(WINDOWS[:1, :1]).logits[0, -1] / generate.TEMPERATURE).softmax(-1)
    share = torch.bincount(found[:, 1], minlength=len(expected)) / count
    assert ((share - expected).abs() < 5 * (expected / count).sqrt() + 1e-3).all()


def test_the_same_text_is_written_once_and_other_text_for_another_seed(small: None, tmp_path: Path) -> None:
    told = Told()
    text = generated(known(tiny("llama")), WINDOWS, 10, 0, "float32", tmp_path, told)
    again = generated(Teacher(gone, tiny("llama").lm_head, ""), WINDOWS, 10, 0, "float32", tmp_path)
    assert torch.equal(text, again) and told.heard == [["generate", 3, 0, 3]]
    other = generated(known(tiny("llama")), WINDOWS, 10, 1, "float32", tmp_path)
    assert not torch.equal(text, other) and len(text.unique(dim=0)) == 10
    assert generated(known(tiny("llama")), WINDOWS, 0, 0, "float32", tmp_path).shape == (0, 16)


def test_a_killed_process_leaves_the_batches_that_are_finished(small: None, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir(), half.mkdir()
    expected = generated(known(tiny("llama")), WINDOWS, 10, 0, "float32", whole)
    with pytest.raises(Killed):
        generated(known(tiny("llama")), WINDOWS, 10, 0, "float32", half, Stop("generate", 2))
    told = Told()
    assert torch.equal(generated(known(tiny("llama")), WINDOWS, 10, 0, "float32", half, told), expected)
    assert told.heard == [["generate", 3, 2, 1]] and kept(half).name == kept(whole).name


def test_a_model_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.lm_head.weight[7] = torch.nan
    with pytest.raises(FailedError, match="NaN or infinity on text that it writes"):
        generated(known(model), WINDOWS, 3, 0, "float32", tmp_path)
