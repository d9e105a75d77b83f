"""Learning: the loss is the divergence it says, learning lowers it, and the same seed gives the same bits."""

import math

import pytest
import torch

from latmix.archs import ARCHS
from latmix.distill import (
    Answers,
    Mapped,
    Step,
    accumulate,
    divergence,
    learn,
    learning_rate,
    loop,
    mean_divergences,
    volume,
)
from latmix.errors import LatmixError
from latmix.model.attach import Attached, attach
from latmix.model.checkpoint import share
from latmix.model.fold import absorb_gains
from latmix.model.maps import build_maps
from latmix.numerics import parse_format
from latmix.recipe import Learning
from tests.models import known, perturb, tiny

WINDOWS = torch.randint(96, (12, 24), generator=torch.Generator().manual_seed(0))


def student_of(teacher, spec: str, *, weights: bool = False, share=share) -> Attached:
    arch, format = ARCHS["llama"], parse_format("mxfp4:scale=even")
    spec += f"{',' if ':' in spec else ':'}shift=full"
    folded, online = {"residual": spec, "values": spec}, {"down": "block-hadamard"}
    maps = build_maps(arch, teacher.config, folded, online, block=32, seed=0)
    return attach(share(teacher), arch, maps, format, format if weights else None)


def teacher():
    """With outlier channels on the stream: something that a map can learn to spread."""
    model = tiny("llama")
    model.get_submodule("model.embed_tokens").weight[:, ::24] *= 30
    absorb_gains(model, ARCHS["llama"])
    return model


def run(spec: str, learning: Learning, *, weights: bool = False) -> tuple[Attached, list[Step]]:
    model = teacher()
    attached, curve = student_of(model, spec, weights=weights), []
    learn(attached, known(model), WINDOWS[:8], WINDOWS[8:], learning, 0, curve.append)
    return attached, curve


def test_divergence_is_kl_and_top_k_of_everything_changes_nothing() -> None:
    p, q = torch.randn(2, 3, 5, 11)
    reference = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none")
    torch.testing.assert_close(divergence(p, q), reference.sum(-1))
    torch.testing.assert_close(divergence(p, q, top_k=11), reference.sum(-1))
    few = divergence(p, q, top_k=3)
    top, where = p.topk(3)
    torch.testing.assert_close(few, divergence(top, q.gather(-1, where)))


def test_schedule_warms_up_and_falls_to_a_tenth() -> None:
    learning = Learning(steps=100, lr=1.0)
    rates = [learning_rate(step, learning) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and rates[4] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize(("form", "lr"), [("lu", 2e-3), ("qr", 2e-3), ("rotation", 2e-2)])
@pytest.mark.parametrize("weights", [False, True])
def test_learning_lowers_the_divergence_and_keeps_the_best_step(form: str, lr: float, weights: bool) -> None:
    learning = Learning(steps=30, batch=4, evaluate_every=5, lr=lr)
    attached, curve = run(f"{form}:init=identity", learning, weights=weights)
    measured = [step.held_out for step in curve if step.held_out is not None]
    assert min(measured) < 0.95 * measured[0]
    held_out = WINDOWS[8:]
    got = mean_divergences(Answers(known(teacher()), held_out), Mapped(attached, 0.0), held_out).mean()
    assert float(got) == pytest.approx(min(measured), rel=1e-4)


def test_same_seed_or_checkpointing_same_bits_and_accumulation_changes_little() -> None:
    def losses(**changes: object) -> list[float | None]:
        """One that differs has had other maps since the step before."""
        return [step.loss for step in run("lu", Learning(steps=4, batch=4, evaluate_every=4, **changes))[1]]

    plain = losses()
    assert losses() == plain == losses(checkpointing=True)
    assert losses(accumulation=2)[1] == pytest.approx(plain[1], rel=1e-4)


def test_bfloat16_compute_is_close_and_leaves_the_maps_in_float32() -> None:
    losses, gradients = [], []
    for compute in ("float32", "bfloat16"):
        attached, learning = student_of(model := teacher(), "lu", weights=True), Learning(compute=compute)
        perturb(attached.maps, 0.1)
        answers = Answers(known(model), WINDOWS, compute=compute)
        losses.append(accumulate(Mapped(attached, 0.0), answers, WINDOWS, torch.arange(12), learning))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in attached.maps.learned()]))
        assert gradients[-1].dtype == torch.float32
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9


def test_checkpointing_keeps_no_moved_weight() -> None:
    """Weights under maps, and their rounded values, are built again in backward, one layer at a time."""

    def saved(checkpointing: bool) -> int:
        attached = student_of(model := teacher(), "lu", weights=True)
        shapes: list[torch.Size] = []
        widths = {attached.model.config.intermediate_size, attached.model.config.hidden_size}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            shapes.append(tensor.shape)
            return tensor

        loop._prepare(attached.model, Learning(checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            accumulate(Mapped(attached, 0.0), Answers(known(model), WINDOWS), WINDOWS, torch.arange(2), Learning())
        return sum(set(shape) == widths for shape in shapes)

    assert saved(True) == 1 < saved(False)  # the frozen head, which has that shape too


def test_volume_is_zero_for_rotations_and_grows_with_scale() -> None:
    attached = student_of(teacher(), "lu")
    assert volume(attached.maps).item() == pytest.approx(0.0, abs=1e-6)
    perturb(attached.maps, 1.0)
    assert volume(attached.maps).item() > 1e-3


def test_divergence_of_the_loss_is_reported() -> None:
    with pytest.raises(LatmixError, match="diverged after step 1"):
        run("lu", Learning(steps=40, batch=4, lr=math.inf))
