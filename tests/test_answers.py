"""The teacher's answers: they are the model's own, asked once, and those on the disk are what was written or are asked
again."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import latmix
from latmix.archs import ARCHS
from latmix.distill import Answers, Teacher
from latmix.distill.answers import asked
from latmix.errors import FailedError, WriteError
from latmix.recipe import Learning
from tests.models import known, tiny
from tests.test_pipeline import save_tiny
from tests.test_progress import Told, of
from tests.test_resume import SETTINGS, Killed, content
from tests.texts import CALIBRATION

WINDOWS = torch.randint(96, (20, 24), generator=torch.Generator().manual_seed(0))


class Asked:
    """Who is asked, and may be killed then. Attributes: batches: how many windows were asked at a time."""

    def __init__(self, death: int = -1) -> None:
        self.model, self.batches = tiny("llama"), list[int]()
        self.model.base_model.register_forward_pre_hook(self._note)
        self._death = death

    def _note(self, _: object, arguments: tuple[torch.Tensor]) -> None:
        if len(self.batches) == self._death:
            raise Killed
        self.batches.append(len(arguments[0]))

    def teacher(self, digest: str = "a") -> Teacher:
        return Teacher(lambda: self.model, self.model.get_output_embeddings(), digest)


def gone() -> PreTrainedModel:
    raise AssertionError("nobody had to be asked")


def kept(folder: Path) -> Path:
    """The one file of answers."""
    (file,) = (file for file in folder.iterdir() if file.suffix != ".parts")
    return file


@pytest.mark.parametrize("name", ARCHS.names())
@pytest.mark.parametrize("stored", [False, True])
def test_they_are_the_models_own(name: str, stored: bool, tmp_path: Path) -> None:
    model = tiny(name)
    answers = Answers(known(model), WINDOWS, tmp_path if stored else None)
    rows = torch.tensor([9, 0, 4, 19])
    torch.testing.assert_close(answers.logits(rows), model(WINDOWS[rows]).logits)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_who_asks_the_same_again_needs_nobody(compute: str, tmp_path: Path) -> None:
    first = Asked()
    expected = Answers(first.teacher(), WINDOWS, tmp_path, compute).logits(torch.arange(20))
    assert first.batches == [8, 8, 4]
    again = Answers(Teacher(gone, first.model.lm_head, "a"), WINDOWS, tmp_path, compute)
    assert torch.equal(again.logits(torch.arange(20)), expected)
    assert torch.equal(Answers(first.teacher(), WINDOWS, None, compute).logits(torch.arange(20)), expected)


def test_a_killed_process_leaves_the_batches_that_are_finished(tmp_path: Path) -> None:
    expected = Answers(known(tiny("llama")), WINDOWS).logits(torch.arange(20))
    with pytest.raises(Killed):
        Answers(Asked(death=2).teacher(), WINDOWS, tmp_path)
    told, second = Told(), Asked()
    answers = Answers(second.teacher(), WINDOWS, tmp_path, progress=told)
    assert second.batches == [4] and told.heard == [["ask the teacher", 3, 2, 1]]
    assert torch.equal(answers.logits(torch.arange(20)), expected)


@pytest.mark.parametrize("damage", ["a bit flipped", "cut short", "list cut short"])
def test_what_is_damaged_is_asked_again(damage: str, tmp_path: Path) -> None:
    expected = Answers(Asked().teacher(), WINDOWS, tmp_path).logits(torch.arange(20))
    file = kept(tmp_path)
    if damage == "a bit flipped":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1  # in the second batch
        file.write_bytes(data)
    else:
        cut = file if damage == "cut short" else file.with_name(file.name + ".parts")
        cut.write_bytes(cut.read_bytes()[:-1])
    second = Asked()
    answers = Answers(second.teacher(), WINDOWS, tmp_path)
    assert second.batches == ([8, 4] if damage == "a bit flipped" else [4])
    assert torch.equal(answers.logits(torch.arange(20)), expected)


@pytest.mark.parametrize(
    ("windows", "compute", "digest"),
    [
        (WINDOWS[:19], "float32", "a"),
        (WINDOWS.flip(0), "float32", "a"),
        (WINDOWS, "bfloat16", "a"),
        (WINDOWS, "float32", "b"),
    ],
)
def test_another_question_or_another_model_is_asked_anew(
    windows: torch.Tensor, compute: str, digest: str, tmp_path: Path
) -> None:
    first = Asked()
    Answers(first.teacher(), WINDOWS, tmp_path)
    other = Asked()
    found = Answers(other.teacher(digest), windows, tmp_path, compute).logits(torch.arange(19))
    assert len(other.batches) == 3
    assert torch.equal(found, Answers(Asked().teacher(), windows, None, compute).logits(torch.arange(19)))
    Answers(Teacher(gone, first.model.lm_head, "a"), WINDOWS, tmp_path)  # and what was there still is


def test_a_disk_without_room_is_an_error_and_what_found_room_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="does not fit into .* No space left"):
        patch.setattr(os, "fsync", full_after(4))
        Answers(Asked().teacher(), WINDOWS, tmp_path)
    second = Asked()
    Answers(second.teacher(), WINDOWS, tmp_path)
    assert second.batches == [4]


def full_after(count: int) -> Callable[[int], None]:
    """So many times it is waited for the disk."""
    left: Iterator[int] = iter(range(count))

    def fsync(_: int) -> None:
        if next(left, None) is None:
            raise OSError(28, os.strerror(28))

    return fsync


def test_answers_that_are_no_numbers_are_refused_by_the_window() -> None:
    model = tiny("llama")
    model.get_submodule("model.embed_tokens").weight[7] = math.nan
    windows = torch.full((11, 8), 3)
    windows[9, 5] = 7
    with pytest.raises(FailedError, match="window 9"):
        Answers(known(model), windows)
    with pytest.raises(FailedError, match="window 9"):
        asked(known(model), windows, torch.tensor([2, 9]), windows[:1], Learning(), None, None)


class Stop(Told):
    """Killed when units of a stage have been told so many times."""

    def __init__(self, stage: str, after: int) -> None:
        super().__init__()
        self._at = (stage, after)

    def advance(self, note: str = "") -> None:
        super().advance(note)
        if (self.heard[-1][0], self.heard[-1][3]) == self._at:
            raise Killed


def quantize(model: Path, out: Path, progress: Told) -> Told:
    """Learning, then tuning, on the same windows; what was told, of each stage."""
    settings = SETTINGS["latmix-plus"] | {f"{stage}.evaluate_every": "1" for stage in ("learning", "tuning")}
    latmix.quantize(model, out, "latmix-plus", CALIBRATION, 0, settings, progress)
    return progress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    heard = quantize(model, out, Told())
    assert of("generate", heard) == [[1, 0, 1]]
    assert of("ask the teacher", heard) == [[1, 0, 1], [1, 0, 1]]  # the windows, and the held-out ones
    assert len(of("load", heard)) == 3  # to learn; the result and the original, to measure
    return out


def test_a_run_killed_in_every_stage_asks_once(model: Path, whole: Path, tmp_path: Path) -> None:
    out, asked, written = tmp_path / "run", [], []
    for stage in ("generate", "ask the teacher", "learning", "quantize", "tuning"):
        with pytest.raises(Killed):
            quantize(model, out, told := Stop(stage, 1))
        asked += of("ask the teacher", told)
        written += of("generate", told)
    heard = quantize(model, out, Told())
    assert asked == [[1, 0, 1], [1, 0, 1]] and not of("ask the teacher", heard)
    assert written == [[1, 0, 1]] and not of("generate", heard)
    assert len(of("load", heard)) == 2  # to measure
    assert content(out) == content(whole)
    assert not list(out.rglob("*answers*")) and not list(out.rglob("*generated*"))


def test_a_full_disk_leaves_the_run(model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left.* the same command goes on"):
        # the text and the answers to it have room, a file and a list each
        patch.setattr("latmix.growing.os", SimpleNamespace(fsync=full_after(4)))
        quantize(model, tmp_path / "run", Told())
    assert len(of("ask the teacher", quantize(model, tmp_path / "run", Told()))) == 1
    assert content(tmp_path / "run") == content(whole)
