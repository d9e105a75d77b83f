"""A learning stage that is interrupted goes on as if nothing had happened; one that runs away says so."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from latmix.archs import ARCHS
from latmix.distill import Step, learn, loop, tune
from latmix.errors import DamagedError, DivergedError, InputError, LatmixError
from latmix.model.attach import Attached
from latmix.model.checkpoint import share
from latmix.numerics import parse_format
from latmix.recipe import Learning, Tuning
from tests.models import codes_of, free_parts, known, rounded
from tests.test_distill import WINDOWS, student_of, teacher

LEARNING = Learning(steps=9, batch=3, evaluate_every=4, lr=5e-3)
Take = Callable[[Step], None]


def learned(take: Take, snapshot: Path | None = None, learning: Learning = LEARNING, seed: int = 0) -> Attached:
    model = teacher()
    attached = student_of(model, "qr", weights=True)
    learn(attached, known(model), WINDOWS[:8], WINDOWS[8:], learning, seed, take, snapshot)
    return attached


def tuned(take: Take, snapshot: Path | None = None) -> dict[str, Tensor]:
    model, arch, format = teacher(), ARCHS["llama"], parse_format("mxfp4:scale=even")
    student = share(model)
    quantized = rounded(student, arch, format)
    unrounded = {path: model.get_parameter(f"{path}.weight") for path in quantized}
    tuning = Tuning(steps=9, batch=3, evaluate_every=4, codes_lr=0.3)
    parts = free_parts(student, arch, quantized, unrounded, tuning)
    tune(student, parts, known(teacher()), WINDOWS[:8], WINDOWS[8:], tuning, 0, take, snapshot)
    codes = codes_of(parts, arch, 2)
    return {name: q.codes for name, q in codes.items()} | dict(student.named_parameters())


def interrupted_at(step: int) -> Take:
    def take(taken: Step) -> None:
        if taken.step == step:
            raise KeyboardInterrupt

    return take


def untimed(curve: list[Step]) -> list[Step]:
    return [dataclasses.replace(step, seconds=0.0) for step in curve]


@pytest.mark.parametrize(("every", "steps"), [(math.inf, (2, 6, 7)), (0.0, (2,))])
def test_interrupted_learning_ends_in_the_same_bytes(
    every: float, steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first snapshot, between two, and once more; and with a snapshot at every step."""
    monkeypatch.setattr(loop, "KEEP_EVERY", every)
    whole: list[Step] = []
    expected = learned(whole.append)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            learned(interrupted_at(step), tmp_path / "snapshot")
    again: list[Step] = []
    actual = learned(again.append, tmp_path / "snapshot")
    assert untimed(again) == untimed(whole)
    for name, tensor in expected.maps.state_dict().items():
        assert torch.equal(tensor, actual.maps.state_dict()[name]), name
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"snapshot", "answers"}
    finished: list[Step] = []
    learned(finished.append, tmp_path / "snapshot")
    assert finished == again  # nothing was done again


def test_interrupted_tuning_ends_in_the_same_bytes(tmp_path: Path) -> None:
    expected = tuned(lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        tuned(interrupted_at(6), tmp_path / "snapshot")
    actual = tuned(lambda _: None, tmp_path / "snapshot")
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize(
    ("changes", "seed", "named"),
    [
        ({"lr": 1e-2}, 0, "learning.lr 0.005, and now it is 0.01"),
        ({"steps": 10}, 0, "learning.steps 9, and now it is 10"),
        ({"top_k": 5}, 0, "learning.top_k None, and now it is 5"),
        ({}, 1, "seed 0, and now it is 1"),
    ],
)
def test_other_steps_are_refused_by_name(changes: dict, seed: int, named: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        learned(interrupted_at(5), tmp_path / "snapshot")
    with pytest.raises(InputError, match=named):
        learned(lambda _: None, tmp_path / "snapshot", dataclasses.replace(LEARNING, **changes), seed)
    learned(lambda _: None, tmp_path / "snapshot", dataclasses.replace(LEARNING, checkpointing=True))  # changes no bit


def test_another_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        learned(interrupted_at(5), tmp_path / "snapshot")
    model = teacher()
    arguments = (LEARNING, 0, lambda _: None, tmp_path / "snapshot")
    with pytest.raises(InputError, match="is of windows"):
        learn(student_of(model, "qr", weights=True), known(model), WINDOWS[1:9], WINDOWS[8:], *arguments)
    with pytest.raises(InputError, match="is of held_out"):
        learn(student_of(model, "qr", weights=True), known(model), WINDOWS[:8], WINDOWS[9:], *arguments)
    with pytest.raises(DamagedError, match="Missing key"):
        learn(student_of(model, "lu", weights=True), known(model), WINDOWS[:8], WINDOWS[8:], *arguments)


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_snapshot_is_refused(cut: bool, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        learned(interrupted_at(5), path := tmp_path / "snapshot")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content[:-7] if cut else content)
    with pytest.raises(DamagedError, match="remove it to start afresh"):
        learned(lambda _: None, path)


def test_a_batch_that_gives_nan_is_named_and_the_best_state_kept(tmp_path: Path) -> None:
    """The student alone breaks, on window 5, from step 6 on."""
    model, curve = teacher(), []
    attached = student_of(model, "qr", weights=True)

    def spoil(module: object, arguments: tuple[Tensor], output: ModelOutput) -> None:
        if len(curve) > 5:
            output.logits[(arguments[0] == WINDOWS[5]).all(1)] = math.nan

    attached.model.register_forward_hook(spoil)
    with pytest.raises(DivergedError, match=r"after step \d: the loss of windows 5 is nan; choose a smaller"):
        learn(attached, known(model), WINDOWS[:8], WINDOWS[8:], LEARNING, 0, curve.append, tmp_path / "snapshot")
    assert (tmp_path / "snapshot").exists()
    assert all(parameter.isfinite().all() for parameter in attached.maps.parameters())


def test_a_gradient_that_is_nan_is_reported_before_the_step() -> None:
    model = teacher()
    attached = student_of(model, "lu")
    next(attached.maps.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(DivergedError, match="after step 0: the norm of the gradient is nan"):
        learn(attached, known(model), WINDOWS[:8], WINDOWS[8:], LEARNING, 0, lambda _: None)
    assert all(parameter.isfinite().all() for parameter in attached.maps.parameters())


def test_a_rate_that_is_too_large_ends_the_stage_at_its_best_state() -> None:
    curve: list[Step] = []
    with pytest.raises(DivergedError, match="smaller learning.lr than 3.0. The best state so far") as caught:
        learned(curve.append, learning=Learning(steps=40, batch=4, lr=3.0, evaluate_every=1))
    assert len(curve) < 12 and isinstance(caught.value, LatmixError)
