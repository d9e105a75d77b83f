"""The pass over the layers: one in memory, checked before it is written, the same whatever the machine does beside."""

import copy
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import latmix
from latmix import convert
from latmix.archs import ARCHS
from latmix.convert import Conversion, Task
from latmix.errors import FailedError, InputError, WriteError
from latmix.model import calibrate, checkpoint, fold_linear, maps, products, states, tensors
from latmix.model.calibrate import Moments
from latmix.model.fold import absorb_layer
from latmix.model.maps import build_maps, reports
from latmix.model.parts import layers
from latmix.model.quantize import quantize_layer
from latmix.model.source import open_source
from latmix.numerics import parse_format
from latmix.progress import Progress
from latmix.rundir import behind
from latmix.stages import Stages
from latmix.transforms import Transform
from latmix.transforms.hadamard import Hadamard
from latmix.weights import MoreDamping, parse_quantizer
from tests.models import perturb, tiny
from tests.test_pipeline import save_tiny, settings, shards
from tests.texts import CALIBRATION

LLAMA, FORMAT = ARCHS["llama"], parse_format("mxfp4:scale=even")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def quantize(model: Path, out: Path, recipe: str = "block-hadamard", **changes: str) -> latmix.Run:
    return latmix.quantize(model, out, recipe, CALIBRATION, 0, settings(recipe) | changes)


def test_no_layer_outlives_its_turn(model: Path, tmp_path: Path) -> None:
    source, windows = open_source(model), torch.arange(96).view(4, 24)
    nothing = build_maps(source.arch, source.config, {}, {}, block=32, seed=0)
    task = Task(source, nothing, FORMAT, FORMAT, parse_quantizer("gptq"), windows, windows[:1])
    stages = Stages(tmp_path / "stages.json")
    conversion = Conversion(task, tmp_path, tmp_path, stages)
    seen: list[bool] = []

    class Watch(Progress):
        def advance(self, note: str = "") -> None:
            seen.extend(p.is_meta for layer in conversion.layers for p in layer.parameters())

    conversion.run(Watch())
    assert len(seen) > 20 and all(seen)
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"}
    assert left == {"stages.json", "taught.2.0", "original.2.0", "quantized.2.0"}  # for the heads alone


def test_without_calibration_and_measurement_no_activation_is_computed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = {"quantizer": "rtn"}
    measured = quantize(model, tmp_path / "measured", **rounded)

    def none(*_: object) -> None:
        raise AssertionError("hidden states were made")

    monkeypatch.setattr(states.States, "put", none)
    run = quantize(model, tmp_path / "run", **rounded, **{"calibration.held_out": "0"})
    assert run.summary["held_out"] is None and run.summary["float_change_kl"] == {"before": None, "after": None}
    assert shards(run.path).keys() == shards(measured.path).keys()
    for name in shards(run.path):  # as bytes they differ: a measured layer has its errors beside it
        ours, other = load_file(run.path / name), load_file(measured.path / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in ours.items())
    with pytest.raises(InputError, match=r"calibration.held_out' is 0; learning needs"):
        quantize(model, tmp_path / "learned", "latmix-lu", **{"calibration.held_out": "0"})


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("weights", "rows"), [("mxfp4:scale=even", {1, 16, 32}), ("nvfp4", {1, 16})])
def test_where_no_activation_is_computed_some_rows_are_in_memory(
    weights: str, rows: set[int], threads: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many they are changes nothing: those of a head, of a block, or what fills a piece; nor do the threads."""
    alone = {"quantizer": "rtn", "calibration.held_out": "0", "weights": weights, "activations": "none"}
    together = quantize(model, tmp_path / "whole", "block-hadamard", **alone)
    seen, right = set[int](), fold_linear.Folding.move

    def watched(folding: fold_linear.Folding, weight: torch.Tensor, bias: None, at: int) -> None:
        seen.add(len(weight))
        return right(folding, weight, bias, at)  # type: ignore[return-value]

    monkeypatch.setattr(fold_linear.Folding, "move", watched)
    monkeypatch.setattr(tensors, "PIECE", 64)
    run = quantize(model, tmp_path / "pieces", "block-hadamard", **alone)
    assert seen == rows
    assert shards(run.path) == shards(together.path)


@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_that_cannot_be_written_is_an_error(
    index: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the next one is at work by then; what was written before it stays."""
    alone = {"quantizer": "rtn", "calibration.held_out": "0"}
    whole, write, out = quantize(model, tmp_path / "whole", **alone), checkpoint.write_layer, tmp_path / "run"

    def full(file: Path, *rest: object) -> None:
        if file.name == checkpoint.layer_file(index):
            raise WriteError("No space left.")
        write(file, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as context, pytest.raises(WriteError, match=r"No space left\."):
        context.setattr(checkpoint, "write_layer", full)
        quantize(model, out, **alone)
    left = [file.name for file in (tmp_path / "run.partial").glob("quantized-layer-*")]
    assert left == [checkpoint.layer_file(earlier) for earlier in range(index)]
    assert shards(quantize(model, out, **alone).path) == shards(whole.path)


def test_what_is_done_behind_is_done_one_thing_at_a_time() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.02)
        done.append(number)

    with behind() as hand_over:
        for number in range(4):
            hand_over(lambda number=number: work(number))  # type: ignore[misc]
            assert len(done) >= number
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(1, 8192), (37, 251), (16, 512)])
def test_products_in_cpp_are_those_of_torch(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), torch.randn(shape[1], products.VECTORS, dtype=torch.float64).T
    wanted = torch.nn.functional.linear(x, weight.double())
    for found in (products._native(weight, x), products._reference(weight, x), products.products(weight, x)):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    columns = weight.T.contiguous().T
    torch.testing.assert_close(products.products(columns, x), wanted, rtol=1e-12, atol=1e-12)


def test_a_wrong_fold_is_found_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fold_linear.moved

    def wrong(weight: torch.Tensor, *rest: object, **options: object) -> object:
        moved, bias = right(weight, *rest, **options)
        moved[1, 3] += 1e-4 * moved.abs().max()
        return moved, bias

    monkeypatch.setattr(fold_linear, "moved", wrong)
    absent = tmp_path / "run"
    with pytest.raises(FailedError, match=r"Layer 0, self_attn.v_proj: folding misses by \d\.\de-0\d of the output"):
        quantize(model, absent, **{"folded.residual": "none"})
    assert not absent.with_name("run.partial").exists()


def folded(place: torch.nn.Linear, source: Transform | None, target: Transform | None) -> torch.nn.Linear:
    moved = copy.deepcopy(place)
    change = fold_linear.Folding(place.in_features, source, target, shifts=0, where="here")
    fold_linear.fold_linear(moved, change)
    return moved


@pytest.mark.parametrize("shift", ["none", "full", "layers"])
def test_folding_agrees_far_below_its_bound(shift: str) -> None:
    """Half the bound, even for a map of condition number 10⁴."""
    place = tiny("llama").model.layers[0].self_attn.o_proj
    arguments = {"block": 32, "seed": 0}
    found = build_maps(LLAMA, tiny("llama").config, {"residual": f"lu:shift={shift}"}, {}, **arguments).double()
    perturb(found, 0.3)
    map = found.folded("residual", 0)
    with torch.no_grad():
        next(p for n, p in map.named_parameters() if "log" in n)[0] += 9.2
    assert map.condition() > 1e4
    tight = fold_linear.AGREEMENT / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fold_linear, "AGREEMENT", tight)
        folded(place, None, map)
        folded(place, map, None)


def test_pieces_do_not_change_what_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    place = tiny("llama").model.layers[0].mlp.up_proj
    places = ({"residual": "lu:shift=full"}, {"o": "lu"})
    map = build_maps(LLAMA, tiny("llama").config, *places, block=32, seed=0).double()
    perturb(map, 0.3)
    source = map.folded("residual", 0)
    whole, square = folded(place, source, None), torch.nn.Linear(64, 64)
    online, dense = Hadamard(64, 32, signs_seed=1).double(), map.online("o", 0)
    both = [folded(square, online, source), folded(square, dense, source)]
    for module in (fold_linear, tensors):
        monkeypatch.setattr(module, "PIECE", 1000)
    pieces = [folded(place, source, None), folded(square, online, source), folded(square, dense, source)]
    for one, other in zip(pieces, [whole, *both], strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(one.bias, other.bias, rtol=1e-6, atol=1e-6)
    assert not torch.equal(whole.weight, place.weight)


def test_a_map_next_to_singular_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = build_maps(LLAMA, tiny("llama").config, {"up": "diagonal", "residual": "lu"}, {}, block=32, seed=0)
    assert reports(found)["up/1"]["condition"] == 1.0
    found.folded("up", 1).log_scale.data[3] += 14.0  # e¹⁴ = 1.2 million
    with pytest.raises(FailedError, match=r"map 'up/1' has condition number 1.2e\+06, above 1.0e\+06"):
        reports(found)
    monkeypatch.setattr(maps, "CONDITION", 2.0**21)
    assert reports(found)["up/1"]["condition"] == pytest.approx(1.2026e6, rel=1e-3)


def test_more_damping_and_dead_inputs_are_noted_by_linear() -> None:
    layer = layers(tiny("llama"), LLAMA)[0]
    absorb_layer(layer, LLAMA)

    def moments(spot: object) -> Moments:
        size = 96 if spot.name == "down" else 64  # type: ignore[attr-defined]
        found = torch.eye(size)
        if spot.name == "o":  # type: ignore[attr-defined]
            found[0, 1] = found[1, 0] = 1.02  # no mean of squares: an eigenvalue of -0.02
        if spot.name == "down":  # type: ignore[attr-defined]
            found[5] = found[:, 5] = 0.0
        return Moments(found, None)

    found = quantize_layer(layer, LLAMA, parse_quantizer("gptq"), FORMAT, moments)
    assert found.damping == {"self_attn.o_proj": pytest.approx(0.1)}
    assert found.dead == {"mlp.down_proj": 1}
    assert str(MoreDamping(0.1)) == "The Hessian needed damping 0.1 to be positive definite."


def test_every_layer_is_in_the_log_with_its_seconds(model: Path, tmp_path: Path) -> None:
    run = quantize(model, tmp_path / "run")
    lines = (run.path / "log.txt").read_text().splitlines()
    pattern = r"[\d-]+ [\d:]+ quantize: (\d)/2, layer \d, [\d.e-]+ s each, \d+ s left"
    assert [match[1] for line in lines if (match := re.fullmatch(pattern, line))] == ["1", "2"]


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "threads": lambda patch: torch.set_num_threads(2),
    "batch": lambda patch: [patch.setattr(place, "BATCH", 3) for place in (calibrate, states)] and None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("recipe", "bound"), [("block-hadamard", 0.01), ("latmix-lu", 0.05)])
def test_threads_and_batches_change_next_to_nothing(
    recipe: str, bound: float, change: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order: a code changes where a target lies on a tie, and what follows from it. The bound, on this
    model: a byte in a hundred, and a hundredth of the divergence; five times that where maps are learned."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = quantize(model, tmp_path / "one", recipe)
        CHANGES[change](monkeypatch)
        other = quantize(model, tmp_path / "other", recipe)
    finally:
        torch.set_num_threads(before)
    codes = [
        {key: tensor for file in shards(run.path) for key, tensor in load_file(run.path / file).items()}
        for run in (one, other)
    ]
    total = sum(tensor.numel() for tensor in codes[0].values())
    differing = sum(int((tensor != codes[1][key]).sum()) for key, tensor in codes[0].items())
    assert differing <= bound * total
    kl = [run.summary["held_out"]["kl"]["mean"] for run in (one, other)]
    assert kl[0] == pytest.approx(kl[1], rel=bound)
    if one.recipe.learning is None:
        assert json.dumps(one.summary["maps"]) == json.dumps(other.summary["maps"])


def test_a_factor_that_threads_share_changes_next_to_no_code() -> None:
    """From some 384 inputs on they add up a Cholesky factor in another order. The bound: a code in ten thousand."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    weight, mixed = (torch.randn(rows, 512, generator=generator) for rows in (64, 512))
    inputs = torch.randn(1024, 512, generator=generator) @ mixed
    codes = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes.append(parse_quantizer("gptq")(weight, inputs.T @ inputs, FORMAT).codes)
    finally:
        torch.set_num_threads(before)
    assert int((codes[0] != codes[1]).sum()) <= weight.numel() // 10_000


def test_gptaq_sees_what_the_original_reads_in_the_basis_of_the_readers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is rounded both see the same: the cross moment is the Hessian, whatever the maps."""
    seen: list[Moments] = []

    def noted(layer: object, arch: object, quantizer: object, format: object, moments: Callable[..., Moments]) -> None:
        seen.extend(moments(spot) for spot in LLAMA.inputs)
        raise FailedError("enough")

    monkeypatch.setattr(convert, "quantize_layer", noted)
    with pytest.raises(FailedError, match="enough"):
        quantize(model, tmp_path / "run", "latmix-lu", quantizer="gptaq", activations="none", weights="mxint8")
    assert len(seen) == len(LLAMA.inputs)
    for each in seen:
        assert each.cross is not None
        torch.testing.assert_close(each.cross, each.hessian, rtol=1e-3, atol=1e-3 * float(each.hessian.abs().max()))
