"""Every architecture × site × transform, attached and folded, keeps the function where declared, and only there."""

import pytest
import torch
from transformers import PreTrainedModel

from latmix.archs import ARCHS
from latmix.errors import LatmixError
from latmix.model.attach import attach
from latmix.model.fold import absorb_gains, fold
from latmix.model.maps import SHIFTS, Maps, build_maps
from latmix.transforms import TRANSFORMS
from tests.models import perturb, tiny

IDS = torch.arange(48).view(2, 24) % 96
SITES = ("residual", "values")
FAMILIES = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tied": True}),
    ("mistral", {}),
    ("qwen2", {"tied": True}),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "head_dim": 32}),
]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value. Weights are float64, but norms compute in float32."""
    return float((a - b).abs().max() / b.abs().max())


def maps_at(model: PreTrainedModel, site: str, transform: str, *, shift: str) -> Maps:
    arch = ARCHS[model.config.model_type]
    maps = build_maps(arch, model.config, {site: f"{transform}:shift={shift}"}, {}, block=32, seed=3)
    perturb(maps, 0.5)
    return maps


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_absorbing_gains_and_untying_preserves_the_function(family: str, options: dict[str, object]) -> None:
    model = tiny(family, **options)
    before = logits(model)
    absorb_gains(model, ARCHS[family])
    assert far(logits(model), before) < 1e-5
    assert all((p == 1).all() for n, p in model.named_parameters() if "layernorm" in n or n == "model.norm.weight")
    assert model.get_submodule("lm_head").weight is not model.get_submodule("model.embed_tokens").weight


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_function_is_preserved_exactly_where_declared(
    family: str, options: dict[str, object], site: str, shift: str, transform: str
) -> None:
    model, arch = tiny(family, **options).double(), ARCHS[family]
    absorb_gains(model, arch)
    before = logits(model)
    maps = maps_at(model, site, transform, shift=shift).double()
    shifted = shift != "none"
    map = maps.folded(site, 0)
    attached = attach(model, arch, maps)
    after = logits(model)
    if arch.site(site).exact_for == "affine" or (map.orthogonal and not shifted):
        assert far(after, before) < 1e-5
    else:
        assert far(after, before) > 1e-3
    fold(attached, None)
    assert far(logits(model), after) < 1e-5
    assert (model.get_submodule(arch.head).bias is not None) == (site == "residual" and shift == "full")


@pytest.mark.parametrize("family", list(ARCHS))
def test_float32_rotation_attached_equals_folded(family: str) -> None:
    model, arch = tiny(family), ARCHS[family]
    absorb_gains(model, arch)
    maps = maps_at(model, "residual", "rotation", shift="none")
    attached = attach(model, arch, maps)
    after = logits(model)
    fold(attached, None)
    assert far(logits(model), after) < 1e-5


@pytest.mark.parametrize("site", ["attention_norm", "mlp_norm", "up"])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_diagonals_in_gains_and_products_are_exact_beside_other_maps(
    family: str, options: dict[str, object], site: str
) -> None:
    model, arch = tiny(family, **options).double(), ARCHS[family]
    absorb_gains(model, arch)
    before = logits(model)
    folded = {"residual": "rotation", site: "diagonal"}
    maps = build_maps(arch, model.config, folded, {"down": "hadamard"}, block=32, seed=3).double()
    perturb(maps, 0.5)
    attached = attach(model, arch, maps)
    assert far(logits(model), before) < 1e-5
    fold(attached, None)
    assert far(logits(model), before) < 1e-5


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("spot", ["qkv", "o", "gate_up", "down"])
def test_any_form_is_exact_online_one_for_each_layer_where_it_has_parameters(spot: str, transform: str) -> None:
    model, arch = tiny("llama").double(), ARCHS["llama"]
    absorb_gains(model, arch)
    before = logits(model)
    maps = build_maps(arch, model.config, {"values": "qr:shift=full"}, {spot: transform}, block=32, seed=3).double()
    perturb(maps, 0.3)
    first, second = maps.online(spot, 0), maps.online(spot, 1)
    assert (first is second) == (not list(first.parameters()))
    attached = attach(model, arch, maps)
    assert far(logits(model), before) < 1e-5
    fold(attached, None)
    assert far(logits(model), before) < 1e-5


@pytest.mark.parametrize("spot", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("family", list(ARCHS))
def test_online_transforms_preserve_the_function_and_stay_after_folding(family: str, spot: str) -> None:
    model, arch = tiny(family).double(), ARCHS[family]
    absorb_gains(model, arch)
    before = logits(model)
    maps = build_maps(arch, model.config, {"residual": "hadamard"}, {spot: "hadamard"}, block=32, seed=3)
    maps.double()
    attached = attach(model, arch, maps)
    assert far(logits(model), before) < 1e-5
    inputs = fold(attached, None)
    assert far(logits(model), before) < 1e-5
    inputs.remove()
    assert far(logits(model), before) > 1e-3  # the weights alone need their online half


def test_everything_at_once_attached_equals_folded_quantized() -> None:
    from latmix.numerics import parse_format

    format = parse_format("mxfp4")
    model, arch = tiny("qwen3", attention_bias=True).double(), ARCHS["qwen3"]
    absorb_gains(model, arch)
    folded, online = {"residual": "lu:shift=full", "values": "qr:shift=full"}, {"down": "block-hadamard"}
    maps = build_maps(arch, model.config, folded, online, block=32, seed=3).double()
    perturb(maps, 0.3)
    attached = attach(model, arch, maps, format)
    after = logits(model)
    with attached.unquantized():
        assert far(logits(model), after) > 1e-3
    fold(attached, format)
    # the same roundings almost everywhere: a tie may fall the other way
    assert (logits(model) - after).abs().median() < 1e-9


def test_unknown_places_are_named() -> None:
    model = tiny("llama")
    with pytest.raises(LatmixError, match="Unknown site 'stream'; known: residual, values, attention_norm"):
        build_maps(ARCHS["llama"], model.config, {"stream": "lu"}, {}, block=32, seed=0)
    with pytest.raises(LatmixError, match="Unknown input 'up'; known: qkv, o, gate_up, down"):
        build_maps(ARCHS["llama"], model.config, {}, {"up": "hadamard"}, block=32, seed=0)
