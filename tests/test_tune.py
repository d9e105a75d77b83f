"""Tuning what is free: it lowers the divergence, touches only what it was given, and codes move one step at most."""

import pytest
import torch

from latmix.archs import ARCHS
from latmix.distill import Step, tune
from latmix.errors import LatmixError
from latmix.model.calibrate import quantize_weights
from latmix.model.checkpoint import share
from latmix.model.fold import absorb_gains
from latmix.model.inputs import quantize_inputs
from latmix.model.maps import build_maps
from latmix.numerics import Quantized, decode, encode, neighbours, parse_format
from latmix.recipe import Tuning
from latmix.weights import parse_quantizer
from tests.models import tiny

WINDOWS = torch.randint(96, (80, 24), generator=torch.Generator().manual_seed(0))
LEARN, FORMAT = WINDOWS[:64], parse_format("mxfp4:scale=even")


def quantized_tiny():
    arch, teacher = ARCHS["llama"], tiny("llama")
    absorb_gains(teacher, arch)
    model = share(teacher)
    maps = build_maps(arch, teacher.config, {}, {"down": "block-hadamard"}, block=32, seed=0)
    quantize_inputs(model, arch, maps, FORMAT)
    quantized = quantize_weights(model, arch, LEARN, parse_quantizer("rtn"), FORMAT, lambda layer: None)
    return teacher, model, quantized


def run(tuning: Tuning):
    teacher, model, quantized = quantized_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    curve: list[Step] = []
    arguments = (teacher, LEARN, WINDOWS[64:], tuning, 0, curve.append)
    tuned = tune(model, ARCHS["llama"], quantized, *arguments)
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
        ({"codes": True}, ("proj.weight",)),
    ],
)
def test_each_part_learns_alone(parts: dict, touched: tuple[str, ...]) -> None:
    nothing = {"kept": (), "biases": (), "codes": False}
    tuning = Tuning(steps=30, batch=32, evaluate_every=5, lr=1e-2, codes_lr=0.06, **(nothing | parts))
    _, _, _, measured, changed = run(tuning)
    assert min(measured) < measured[0]
    assert changed and all(name.endswith(touched) or any(word in name for word in touched) for name in changed)


def test_codes_move_one_step_and_the_model_holds_what_they_decode_to() -> None:
    model, before, after, _, _ = run(Tuning(steps=30, batch=32, evaluate_every=5, codes_lr=0.06, kept=(), biases=()))
    moved = 0
    for path, old in before.items():
        below, here, above = neighbours(old)
        values = decode(after[path])
        assert torch.all((values == below) | (values == here) | (values == above))
        assert torch.equal(after[path].scales, old.scales)
        assert torch.equal(model.get_submodule(path).weight, values)
        moved += int((values != here).sum())
    assert moved > 0


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
    teacher, model, quantized = quantized_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuning = Tuning(steps=8, batch=32, evaluate_every=4, codes_lr=0.2)
    tune(share(model), ARCHS["llama"], quantized, teacher, LEARN, LEARN[:8], tuning, 0, lambda step: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_parts_name_the_known() -> None:
    with pytest.raises(LatmixError, match="'norms' in tuning.kept; known: gains, embedding, head"):
        run(Tuning(kept=("norms",)))
    with pytest.raises(LatmixError, match="known: qkv, o, gate_up, down"):
        run(Tuning(biases=("up",)))
