"""Every baseline has the property that defines it in its source, and says what it runs online."""

import dataclasses
import inspect
import re
from functools import partial

import pytest
import torch

from latmix.archs import ARCHS
from latmix.distill import objective
from latmix.errors import LatmixError
from latmix.layerwise import learn_layers
from latmix.model.attach import attach
from latmix.model.calibrate import Stream
from latmix.model.checkpoint import share
from latmix.model.fit import fit, fitted, metric
from latmix.model.fold import absorb_gains, fold
from latmix.model.maps import Maps, build_maps
from latmix.model.parts import layers
from latmix.numerics import decode, fake_quant, parse_format
from latmix.progress import Progress
from latmix.recipe import Calibration, Layerwise, Learning, Recipe, Tuning
from latmix.recipes import RECIPES, find
from latmix.transforms import LU, QR, Affine, BlockRotation, Diagonal, Hadamard, Wush
from latmix.transforms.wush import optimum
from latmix.weights import GPTQ, parse_quantizer, proxy_loss
from tests.models import perturb, tiny

LLAMA = ARCHS["llama"]
WINDOWS = torch.randint(96, (6, 24), generator=torch.Generator().manual_seed(0))
PURE = {"rtn", "gptq"}
EVERYWHERE = {"mr-gptq", "wush", "flatquant"}


def maps_of(recipe: Recipe, model: torch.nn.Module) -> Maps:
    return build_maps(LLAMA, model.config, recipe.folded, recipe.online, block=32, seed=0)


@pytest.fixture
def model():
    made = tiny("llama")
    made.get_submodule("model.embed_tokens").weight[:, ::24] *= 30  # outliers: something to spread
    absorb_gains(made, LLAMA)
    return made


@pytest.mark.parametrize("name", RECIPES.names())
def test_what_runs_online_is_stated(name: str) -> None:
    inputs = {spot.name for spot in LLAMA.inputs}
    expected = set() if name in PURE else inputs if name in EVERYWHERE else {"down"}
    assert set(find(name).online) == expected


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES.names())
def test_maps_at_random_parameters_keep_the_function_unless_they_are_affine(name: str, model) -> None:
    """Rotations, what norms and values allow, and everything online: exact by construction, whatever is learned."""
    before = model.double()(WINDOWS[:2]).logits
    maps = maps_of(find(name), model).double()
    perturb(maps, 0.3)
    attached = attach(model, LLAMA, maps)
    after = model(WINDOWS[:2]).logits
    exact = float((after - before).abs().max() / before.abs().max()) < 1e-5
    assert exact == (not name.startswith("latmix-"))
    fold(attached, None)
    torch.testing.assert_close(model(WINDOWS[:2]).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES.names())
def test_a_recipe_cites_its_source(name: str) -> None:
    about = inspect.getdoc(RECIPES[name]) or ""
    assert re.search(r"\(.*\d{4}\.\d{5}\)", about) or "Not published" in about


def test_rtn_sees_no_data_and_gptq_trades_errors_between_columns() -> None:
    rtn, gptq, format = find("rtn"), find("gptq"), parse_format(find("rtn").weights)
    assert not (rtn.folded or rtn.online or rtn.learning or rtn.tuning)
    assert gptq == dataclasses.replace(rtn, name="gptq", quantizer="gptq")
    weight, mixed = torch.randn(16, 64), torch.randn(64, 64)
    hessian = mixed @ mixed.T / 64
    nearest, traded = (parse_quantizer(recipe.quantizer)(weight, hessian, format) for recipe in (rtn, gptq))
    torch.testing.assert_close(decode(nearest), fake_quant(weight, format), rtol=0, atol=0)
    assert proxy_loss(weight, traded, hessian) < 0.8 * proxy_loss(weight, nearest, hessian)


def test_block_hadamard_is_one_fixed_matrix_inside_every_block(model) -> None:
    maps = maps_of(find("block-hadamard"), model)
    assert not maps.learned()
    for map in (maps.folded("residual", 0), maps.online("down", 1)):
        blocks = [Hadamard(32).matrix()] * (map.size // 32)
        torch.testing.assert_close(map.matrix()[: 32 * len(blocks), : 32 * len(blocks)], torch.block_diag(*blocks))


@pytest.mark.parametrize(("name", "form"), [("latmix-lu", LU), ("latmix-qr", QR)])
def test_latmix_learns_full_affine_maps_of_stream_and_values_on_kl(name: str, form: type, model) -> None:
    recipe = find(name)
    assert recipe.learning == Learning() and recipe.learning.objective == "kl" and recipe.quantizer == "gptq"
    maps = maps_of(recipe, model)
    assert set(recipe.folded) == {"residual", "values"} and recipe.online == {"down": "block-hadamard"}
    perturb(maps, 1.0)
    map = maps.folded("residual", 0)
    assert isinstance(map, Affine) and isinstance(map.linear_part, form) and bool((map.shift != 0).all())
    matrix = map.matrix()
    assert (matrix[:32, 32:] != 0).all() and not torch.allclose(matrix @ matrix.T, torch.eye(64), atol=0.1)
    signs = [map.linear_part.diagonal.scale.sign() for map in (map, maps_of(recipe, model).folded("residual", 0))]
    assert torch.equal(*signs)  # whatever is learned


def test_latmix_plus_is_latmix_tuned() -> None:
    longer = {"learning": Learning(steps=600), "tuning": Tuning(), "calibration": Calibration(generated=3840)}
    assert find("latmix-plus") == dataclasses.replace(find("latmix-qr"), name="latmix-plus", **longer)


def test_quarot_rotates_everything_at_random_and_rtn_differs_in_the_weights_alone(model) -> None:
    first, second = (build_maps(LLAMA, model.config, find("quarot").folded, {}, block=32, seed=s) for s in (0, 1))
    one, other = first.folded("residual", 0).matrix(), second.folded("residual", 0).matrix()
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.abs(), torch.full((64, 64), 64**-0.5))
    rtn = find("quarot-rtn")
    assert (rtn.quantizer, rtn.folded, rtn.online) == ("rtn", find("quarot").folded, find("quarot").online)


def test_spinquant_learns_rotations_on_the_cross_entropy_of_the_text(model) -> None:
    recipe = find("spinquant")
    assert recipe.learning is not None and not recipe.learning.weights and recipe.learning.objective == "cross-entropy"
    logits = torch.randn(2, 24, 96)
    loss = objective(logits, WINDOWS[:2], None)
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, WINDOWS[:2, 1:, None])
    torch.testing.assert_close(loss, -picked.mean())
    maps = maps_of(recipe, model)
    perturb(maps, 1.0)
    assert maps.learned()
    for map in maps.each().values():
        matrix = map.matrix()
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), rtol=0, atol=1e-5)


def test_brq_never_mixes_two_blocks(model) -> None:
    maps = maps_of(find("brq"), model)
    perturb(maps, 1.0)
    map = maps.folded("residual", 0)
    assert isinstance(map, BlockRotation)
    matrix = map.matrix()
    assert matrix[:32, 32:].abs().max() == 0 and matrix[32:, :32].abs().max() == 0
    assert (matrix[:32, :32] != Hadamard(64, 32).matrix()[:32, :32]).all()  # and it did learn inside


def test_mr_gptq_searches_scales_and_spreads_each_block_alone(model) -> None:
    recipe = find("mr-gptq")
    assert parse_quantizer(recipe.quantizer) == GPTQ(search=True) and not recipe.folded
    weight = torch.randn(16, 64) * torch.randn(16, 64).exp()
    format, flat = parse_format("mxint4"), torch.eye(64)
    searched, plain = (proxy_loss(weight, GPTQ(search=s)(weight, flat, format), flat) for s in (True, False))
    assert searched < plain  # with an identity for a Hessian, the loss is the squared error
    matrix = maps_of(recipe, model).online("qkv", 1).matrix()
    torch.testing.assert_close(matrix, torch.block_diag(*[Hadamard(32).matrix()] * 2))


def test_ostquant_scales_norms_and_mlp_for_free(model) -> None:
    recipe = find("ostquant")
    assert recipe.learning == Learning(top_k=1000)
    maps = maps_of(recipe, model)
    for site in ("attention_norm", "mlp_norm", "up"):
        assert isinstance(maps.folded(site, 1), Diagonal)
    perturb(maps, 0.5)
    fold(attach(model, LLAMA, maps), None)
    gains = [layer.get_submodule("input_layernorm").weight for layer in layers(model, LLAMA)]
    torch.testing.assert_close(gains[1], maps.folded("attention_norm", 1).scale.detach())
    assert not torch.equal(gains[0], gains[1])


def test_a_norm_and_a_product_of_coordinates_take_diagonals_only(model) -> None:
    with pytest.raises(LatmixError, match="'attention_norm' cannot hold the transform 'lu'; choose diagonal"):
        build_maps(LLAMA, model.config, {"attention_norm": "lu"}, {}, block=32, seed=0)


def test_wush_attains_the_bound_of_its_cost_and_nothing_near_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, 32, generator=generator, dtype=torch.float64)
    moment, reader = a @ a.T + torch.eye(32), b.T @ b + torch.eye(32)

    def cost(t: torch.Tensor) -> float:
        inverse = torch.linalg.inv(t)
        return float((t @ moment @ t.T).trace() * (inverse.T @ reader @ inverse).trace() / 32)

    best = optimum(moment, reader)
    # s: singular values of G^½ S^½ are the roots of the eigenvalues of S G
    bound = torch.linalg.eigvals(moment @ reader).real.sqrt().sum() ** 2 / 32
    assert cost(best) == pytest.approx(float(bound), rel=0.02)  # 0.02: damping
    assert cost(best) < 0.9 * cost(torch.eye(32, dtype=torch.float64))
    for _ in range(20):
        nearby = best + 0.05 * torch.randn(32, 32, generator=generator, dtype=torch.float64)
        assert cost(nearby) > cost(best)
    scaled = best @ moment @ best.T  # the Hadamard matrix shares the variance out evenly
    assert scaled.diagonal().std() < 0.05 * scaled.diagonal().mean()


def test_wush_is_fitted_to_the_activations_and_readers_of_each_layer(model) -> None:
    maps = maps_of(find("wush"), model)
    stream = Stream(model, LLAMA, WINDOWS)
    for index, layer in enumerate(layers(model, LLAMA)):
        fit(maps, LLAMA, index, layer, partial(stream.hessian, index))
        stream.advance(index)
    spot = LLAMA.input("gate_up")
    stream = Stream(model, LLAMA, WINDOWS)
    stream.advance(0)
    moment, weights = stream.hessian(1, spot), metric(layers(model, LLAMA)[1], spot)
    found = maps.online("gate_up", 1)
    assert isinstance(found, Wush)
    expected = optimum(moment[32:, 32:].double(), weights[32:, 32:].double()).float()
    torch.testing.assert_close(found.matrix()[32:, 32:], expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(LatmixError, match="remove folded.residual"):
        fitted(build_maps(LLAMA, model.config, {"residual": "lu"}, {"qkv": "wush"}, block=32, seed=0), LLAMA, 0)


def test_flatquant_lowers_each_layers_own_error_and_never_needs_the_next(model) -> None:
    recipe = Recipe("f", online=find("flatquant").online, layerwise=Layerwise(epochs=8, batch=2))
    format = parse_format(recipe.activations)

    @torch.no_grad()
    def error(maps: Maps, index: int) -> float:
        attached = attach(share(model), LLAMA, maps, format, format)
        stream = Stream(model, LLAMA, WINDOWS)
        for layer in range(index):
            stream.advance(layer)
        entering = torch.cat(stream.hidden)
        stream.advance(index)
        out = layers(attached.model, LLAMA)[index](entering, **stream.arguments[index])
        return float((out - torch.cat(stream.hidden)).square().mean())

    maps = maps_of(recipe, model)
    before = [error(maps, index) for index in range(2)]
    learn_layers(attach(share(model), LLAMA, maps, format, format), model, WINDOWS, recipe.layerwise, 0, Progress())
    after = [error(maps, index) for index in range(2)]
    assert after[0] < 0.9 * before[0] and after[1] < 0.9 * before[1]
    assert not torch.equal(maps.online("qkv", 0).matrix(), maps.online("qkv", 1).matrix())
