"""Tuning what is free: it lowers the divergence, touches only its parts; codes move one step at most."""

import pytest
import torch

from latmix.archs import ARCHS
from latmix.distill import Step, tune
from latmix.errors import LatmixError
from latmix.model.checkpoint import share
from latmix.model.fold import absorb_gains
from latmix.model.inputs import quantize_inputs
from latmix.model.latent import Latent
from latmix.model.maps import build_maps
from latmix.model.parts import linears
from latmix.numerics import Quantized, decode, decode_scales, encode, neighbours, parse_format
from latmix.recipe import Tuning
from tests.models import codes_of, free_parts, known, rounded, tiny

WINDOWS = torch.randint(96, (80, 24), generator=torch.Generator().manual_seed(0))
LEARN, FORMAT = WINDOWS[:64], parse_format("mxfp4:scale=even")


def quantized_tiny():
    arch, teacher = ARCHS["llama"], tiny("llama")
    absorb_gains(teacher, arch)
    model = share(teacher)
    maps = build_maps(arch, teacher.config, {}, {"down": "block-hadamard"}, block=32, seed=0)
    quantize_inputs(model, arch, maps, FORMAT)
    unrounded = {path: place.weight for path, place in linears(model, arch).items()}
    return teacher, model, rounded(model, arch, FORMAT), unrounded


def run(tuning: Tuning):
    teacher, model, quantized, unrounded = quantized_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    curve: list[Step] = []
    parts = free_parts(model, ARCHS["llama"], quantized, unrounded, tuning)
    tune(model, parts, known(teacher), LEARN, WINDOWS[64:], tuning, 0, curve.append)
    tuned = codes_of(parts, ARCHS["llama"], 2)
    measured = [step.held_out for step in curve if step.held_out is not None]
    after = model.state_dict()
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    return model, quantized, tuned, measured, changed


@pytest.mark.parametrize(
    ("parts", "touched"),
    [
        ({"kept": ("gains",)}, ("norm",)),
        ({"kept": ("embedding",)}, ("embed_tokens",)),
        ({"kept": ("head",)}, ("lm_head",)),
        ({"biases": ("qkv", "down")}, ("q_proj.bias", "k_proj.bias", "v_proj.bias", "down_proj.bias")),
        ({"codes": True}, ("proj.parametrizations",)),
    ],
)
def test_each_part_learns_alone(parts: dict, touched: tuple[str, ...]) -> None:
    nothing = {"kept": (), "biases": (), "codes": False}
    tuning = Tuning(steps=30, batch=32, evaluate_every=5, lr=1e-2, codes_lr=0.06, **(nothing | parts))
    _, _, _, measured, changed = run(tuning)
    assert min(measured) < measured[0]
    assert changed and all(name.endswith(touched) or any(word in name for word in touched) for name in changed)


def test_codes_move_one_step_and_the_model_holds_what_they_decode_to() -> None:
    fast = Tuning(steps=30, batch=32, evaluate_every=5, codes_lr=0.06, kept=(), biases=())
    model, before, after, _, _ = run(fast)
    moved = 0
    for path, old in before.items():
        below, here, above = neighbours(old)
        values = decode(after[path])
        assert torch.equal(after[path].scales, old.scales)
        assert torch.all((values == below) | (values == here) | (values == above))
        assert torch.equal(model.get_submodule(path).weight, values)
        moved += int((values != here).sum())
    assert moved > 0


def latent_of(name: str) -> tuple[Latent, torch.Tensor, Quantized]:
    """A latent at a random weight, whose codes another rounding than the nearest has chosen here and there."""
    weight = torch.randn(12, 80, generator=torch.Generator().manual_seed(1))
    weight[0, :32] = 0.0
    quantized = encode(weight + 0.2 * torch.randn_like(weight), parse_format(name))
    return Latent(quantized), weight, quantized


FORMATS = ["mxfp4:scale=even", "mxint4", "mxfp4:block=16", "nvfp4", "mxfp6_e2m3"]


@pytest.mark.parametrize("name", FORMATS)
def test_latents_start_at_the_stored_codes_as_near_to_the_unrounded_weight_as_their_cells_allow(name: str) -> None:
    latent, weight, quantized = latent_of(name)
    start = latent.right_inverse(weight)
    below, here, above = neighbours(quantized)
    assert torch.equal(latent(start), here)
    value = (
        start
        * decode_scales(quantized.scales, quantized.format, quantized.tensor_scale).repeat_interleave(
            quantized.format.block, 1
        )[:, : weight.shape[1]]
    )
    inside = (weight > here + 0.49 * (below - here)) & (weight < here + 0.49 * (above - here))
    torch.testing.assert_close(value[inside], weight[inside])
    assert torch.all(((value - here) * (weight - here))[~inside] >= 0)  # on the right side of the code


@pytest.mark.parametrize("name", FORMATS)
def test_settled_codes_encode_what_the_latents_give_wherever_these_were_sent(name: str) -> None:
    latent, weight, quantized = latent_of(name)
    far = latent.right_inverse(weight)
    far += 9 * torch.randn_like(far)
    latent.constrain_(far, 0.0)
    settled = latent.settled(far)
    assert torch.equal(decode(settled), latent(far)) and torch.equal(settled.scales, quantized.scales)
    below, _, above = neighbours(quantized)
    assert torch.all(latent(far).abs() <= torch.maximum(below.abs(), above.abs()))
    assert not torch.equal(settled.codes, quantized.codes)


@pytest.mark.parametrize("name", FORMATS)
def test_damping_draws_latents_to_their_codes_and_changes_none(name: str) -> None:
    latent, weight, _ = latent_of(name)
    moved = latent.right_inverse(weight)
    latent.constrain_(moved.add_(torch.randn_like(moved)), 0.0)
    codes, before = latent(moved), moved.clone()
    latent.constrain_(moved, 0.25)
    assert torch.equal(latent(moved), codes) and not torch.equal(moved, before)
    latent.constrain_(at_rest := before.clone(), 1.0)
    torch.testing.assert_close(moved, torch.lerp(before, at_rest, 0.25))
    assert torch.equal(latent(at_rest), codes)


def test_a_damped_run_ends_nearer_to_its_codes() -> None:
    def distance(damping: float) -> float:
        tuning = Tuning(steps=30, batch=32, evaluate_every=30, codes_lr=0.06, damping=damping)
        teacher, model, quantized, unrounded = quantized_tiny()
        parts = free_parts(model, ARCHS["llama"], quantized, unrounded, tuning)
        tune(model, parts, known(teacher), LEARN, WINDOWS[64:], tuning, 0, lambda step: None)
        latents = [values.detach() for values in parts.latents.values()]
        before = [values.clone() for values in latents]
        parts.constrain(1.0)
        return max(float((a - b).abs().mean()) for a, b in zip(before, latents, strict=True))

    assert distance(0.3) < 0.7 * distance(0.0)


@pytest.mark.parametrize("name", ["mxfp4", "mxint4", "nvfp4", "mxfp8_e4m3", "mxint8"])
def test_neighbours_are_the_next_numbers_of_the_grid(name: str) -> None:
    format = parse_format(name)
    element = format.element
    finite = sorted({value for value in element.values if abs(value) <= element.max})
    codes = torch.tensor([[element.values.index(value) for value in finite]], dtype=torch.uint8)
    scales = encode(torch.ones(1, len(finite)), format).scales
    one = torch.tensor(1.0) if format.scale_element == "e4m3" else None
    below, here, above = neighbours(Quantized(codes, scales, one, format, torch.float32))
    unit = float(here[0, -1]) / finite[-1]
    expected = torch.tensor(finite) * unit
    torch.testing.assert_close(here[0], expected, rtol=0, atol=0)
    assert torch.equal(below[0, 1:], expected[:-1]) and torch.equal(above[0, :-1], expected[1:])
    assert below[0, 0] == expected[0] and above[0, -1] == expected[-1]


def test_a_model_that_shares_its_tensors_is_left_alone() -> None:
    teacher, model, quantized, unrounded = quantized_tiny()
    before = {name: tensor.clone() for name, tensor in [*model.state_dict().items(), *unrounded.items()]}
    tuning = Tuning(steps=8, batch=32, evaluate_every=4, codes_lr=0.2)
    student = share(model)
    parts = free_parts(student, ARCHS["llama"], quantized, unrounded, tuning)
    tune(student, parts, known(teacher), LEARN, LEARN[:8], tuning, 0, lambda step: None)
    after = [*model.state_dict().items(), *unrounded.items()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in after)


def test_unknown_parts_name_the_known() -> None:
    with pytest.raises(LatmixError, match="'norms' in tuning.kept; known: gains, embedding, head"):
        run(Tuning(kept=("norms",)))
    with pytest.raises(LatmixError, match="known: qkv, o, gate_up, down"):
        run(Tuning(biases=("up",)))
