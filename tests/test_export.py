"""Exports: every recipe × target works and is verified, or is refused with the reason.

The engines themselves are too large for this suite. What stands in: transformers runs for real; vLLM by its stock
architecture, filled by a reader that shares no code with latmix (the plugin's arithmetic, tests/engines); llama.cpp by
the gguf package's own decoder. `tests/test_engines.py` runs the engines where they are installed.
"""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import latmix
from latmix import export as exports
from latmix.archs import ARCHS
from latmix.export import fingerprint
from latmix.export.source import GLOBAL, open_run
from latmix.model.layout import layout_of
from latmix.model.load import load_tokenizer
from latmix.recipe import override
from latmix.recipes import RECIPES, find
from latmix.targets import TARGETS, expected, fit
from tests.engines.vllm_cpu_mxfp4.vllm_cpu_mxfp4 import rounded_nv
from tests.exported import WITH_GGUF, Runs, agrees
from tests.models import tiny
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION

WITH_COMPRESSED_TENSORS = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


@pytest.mark.parametrize("target", [pytest.param(t, marks=WITH_GGUF if t == "gguf" else ()) for t in TARGETS])
@pytest.mark.parametrize("recipe", RECIPES.names())
def test_every_recipe_times_target_is_verified_or_refused(recipe: str, target: str, runs: Runs, tmp_path: Path) -> None:
    run, out = runs(recipe), tmp_path / "out"
    source = open_run(run)
    if refusals := TARGETS[target].refusals(source.layout, source.recipe):
        with pytest.raises(latmix.LatmixError, match="cannot express this run") as refused:
            exports.export(run, target, out)
        assert all(refusal.reason in str(refused.value) and refusal.settings for refusal in refusals)
        assert not out.exists() and f"--set target={target}" in str(refused.value)
        run = runs(recipe, target=target)  # the advice is followed
    agrees(target, exports.export(run, target, out), run)


@WITH_COMPRESSED_TENSORS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations": "none"},
        {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3:scale=rceil"},
        {"weights": "nvfp4", "activations": "none"},
        {"weights": "nvfp4", "activations": "nvfp4:tensor_scale=1"},
    ],
)
def test_transformers_with_compressed_tensors_computes_the_same(
    changes: dict[str, str], runs: Runs, tmp_path: Path
) -> None:
    out = exports.export(runs("gptq", **changes), "compressed-tensors", tmp_path / "out")
    verdict = exports.verify(out, "transformers")
    assert verdict.passed and verdict.kl < 1e-6 and verdict.greedy >= 20


def test_readers_of_an_input_share_their_tensor_wide_scale(runs: Runs) -> None:
    source = open_run(runs("gptq", weights="nvfp4", activations="none"))
    for spot in source.arch.inputs:
        assert len({float(source.tensor(f"model.layers.0.{reader}{GLOBAL}")) for reader in spot.readers}) == 1
    scales = {float(source.tensor(path + GLOBAL)) for path in source.linears()}
    assert len(scales) > 1 and {math.frexp(scale)[0] for scale in scales} == {0.5}  # powers of two


def test_transformers_is_no_engine_for_online_transforms(runs: Runs, tmp_path: Path) -> None:
    online = exports.export(runs("quarot"), "compressed-tensors", tmp_path / "online")
    with pytest.raises(latmix.LatmixError, match="engine 'transformers' cannot serve"):  # it would compute nonsense
        exports.verify(online, "transformers")
    card = (online / "README.md").read_text()
    assert "Do not load this with transformers" in card and "library_name: vllm\n" in card


@pytest.mark.parametrize("target", [pytest.param(t, marks=WITH_GGUF if t == "gguf" else ()) for t in TARGETS])
@pytest.mark.parametrize("family", list(ARCHS))
def test_every_recipe_fits_every_target_and_family(family: str, target: str) -> None:
    """What `--set target=` makes of a recipe, no engine refuses; before a model has been read."""
    model = tiny(family)
    for name in RECIPES.names():
        recipe = dataclasses.replace(find(name), target=target)
        layout = layout_of(model, ARCHS[family], recipe)
        fitted = fit(recipe, layout)
        assert not TARGETS[target].refusals(expected(fitted, layout), fitted)
        assert fit(fitted, layout) == fitted


def test_attention_within_a_window_is_not_written_to_gguf() -> None:
    recipe = dataclasses.replace(find("gptq"), target="gguf")
    layout = layout_of(tiny("mistral", sliding_window=8), ARCHS["mistral"], recipe)
    with pytest.raises(latmix.LatmixError, match="cannot serve this: attention within a sliding window is not written"):
        fit(recipe, layout)


@pytest.mark.parametrize("target", [pytest.param(t, marks=WITH_GGUF if t == "gguf" else ()) for t in TARGETS])
@pytest.mark.parametrize("family", [name for name in ARCHS if name != "llama"])
@pytest.mark.parametrize("recipe", ["quarot", "latmix-plus"])
def test_every_family_is_served_with_what_its_stock_form_can_hold(
    recipe: str, family: str, target: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Randomised signs in the one, shifts and tuned biases in the other: between them all that writers do."""
    monkeypatch.setattr(fingerprint, "WINDOWS", 2)
    run = runs(recipe, family, target=target)
    agrees(target, exports.export(run, target, tmp_path / "out"), run)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("mxfp4", "none"),
        ("mxfp8_e4m3", "mxfp8_e4m3:scale=rceil"),
        ("nvfp4", "nvfp4:tensor_scale=0.0625"),
    ],
)
def test_other_formats_of_compressed_tensors(weights: str, activations: str, runs: Runs, tmp_path: Path) -> None:
    run = runs("gptq" if weights == "nvfp4" else "quarot", weights=weights, activations=activations)
    agrees("compressed-tensors", exports.export(run, "compressed-tensors", tmp_path / "out"), run)
    manifest = exports.open_export(tmp_path / "out")
    asked = exports.EXPORTS["compressed-tensors"].serve(Path("out"), manifest["recipe"]["activations"])
    assert asked.endswith("--linear-backend marlin") == (activations == "none")


@WITH_GGUF
def test_gguf_opens_a_text_with_the_token_that_the_tokenizer_opens_it_with(runs: Runs, tmp_path: Path) -> None:
    import gguf

    out = exports.export(runs("gptq"), "gguf", tmp_path / "out")
    fields = gguf.GGUFReader(out / "model.gguf").fields
    first = load_tokenizer(out)("Some text.")["input_ids"][0]
    assert fields["tokenizer.ggml.bos_token_id"].contents() == first
    assert fields["tokenizer.ggml.add_bos_token"].contents()
    assert json.loads((runs("gptq") / "config.json").read_text())["bos_token_id"] != first


def test_a_shift_within_the_layers_is_served_by_stock_models(runs: Runs, tmp_path: Path) -> None:
    changes = {"folded.residual": "lu:shift=layers", "online.down": "none"}
    run = runs("latmix-lu", **changes)
    out = exports.export(run, "compressed-tensors", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert config["mlp_bias"] and config["attention_bias"]
    agrees("compressed-tensors", out, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "mxint4"}, "weights are mxint4, not mxfp4"),
        ({"activations": "mxfp4:scale=floor"}, "the engine as mxfp4:scale=even"),
        ({"weights": "nvfp4", "activations": "nvfp4"}, "activations as nvfp4, the engine as nvfp4:tensor_scale=1.0"),
    ],
)
def test_formats_that_engines_lack_are_refused(
    changes: dict[str, str], message: str, runs: Runs, tmp_path: Path
) -> None:
    with pytest.raises(latmix.LatmixError, match=message):
        exports.export(runs("rtn", **changes), "compressed-tensors", tmp_path / "out")
    with pytest.raises(latmix.LatmixError, match=f"cannot serve this: .*{message}.* avoids it"):  # nor changed silently
        runs("rtn", **changes, target="compressed-tensors")


@pytest.mark.parametrize("scale", [1.0, 2.0**-4, 2.0**3])
def test_a_fixed_tensor_scale_rounds_as_engines_do(scale: float) -> None:
    """Against the plugin's arithmetic: from blocks that a scale of zero makes zero to those that saturate."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) * torch.linspace(-12, 14, 400).exp2().unsqueeze(1) * scale
    found = latmix.fake_quant(x, f"nvfp4:tensor_scale={scale}")
    assert torch.equal(found, rounded_nv(x, torch.tensor([1 / scale])))
    assert torch.equal(found[7:8], latmix.fake_quant(x[7:8], f"nvfp4:tensor_scale={scale}"))  # whatever else is there
    stored = latmix.encode(x, f"nvfp4:tensor_scale={scale}")
    assert torch.equal(latmix.decode(stored), found) and float(stored.tensor_scale) == scale
    magnitudes = found.abs().amax(-1)
    assert (magnitudes == 0).sum() > 20 and magnitudes.max() == 6 * 448 * scale


def test_activations_that_share_a_scale_over_the_batch_are_served_under_a_fixed_one(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(latmix.LatmixError, match=r"one scale over the whole batch.*nvfp4:tensor_scale=1 avoids"):
        exports.export(runs("rtn", weights="nvfp4", activations="nvfp4"), "transformers", tmp_path / "out")
    run = runs("quarot", weights="nvfp4", activations="nvfp4:tensor_scale=1")
    agrees("transformers", exports.export(run, "transformers", tmp_path / "out"), run)


def test_widths_that_no_block_divides_are_refused_before_anything_is_learned(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", intermediate_size=172)
    with pytest.raises(latmix.LatmixError, match="cannot serve this: a linear's input width of 172"):
        latmix.quantize(model, tmp_path / "run", "gptq", CALIBRATION, 0, settings("gptq") | {"target": "gguf"})
    run = latmix.quantize(model, tmp_path / "run", "rtn", CALIBRATION, 0, settings("rtn"))
    with pytest.raises(latmix.LatmixError, match="input width of 172 is no multiple of the block of 32"):
        exports.export(run.path, "compressed-tensors", tmp_path / "out")
    agrees("transformers", exports.export(run.path, "transformers", tmp_path / "out"), run.path)


def test_fit_leaves_recipes_without_a_target_alone_and_is_idempotent(runs: Runs) -> None:
    kept, fitted = find(str(runs("latmix-lu") / "recipe.json")), runs("latmix-lu", target="compressed-tensors")
    assert kept == override(find("latmix-lu"), settings("latmix-lu"))
    recipe = find(str(fitted / "recipe.json"))
    assert recipe.folded == {"residual": "lu", "values": "lu:shift=full"} and recipe.online == kept.online


@pytest.mark.parametrize("target", list(TARGETS))
def test_the_readme_serves_as_the_export_says(target: str) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    served = exports.EXPORTS[target].serve(Path("served"), "mxfp4:scale=even")
    assert served in readme
    alone = exports.EXPORTS[target].serve(Path("served"), None)
    guide = (Path(__file__).parents[1] / "docs" / "guide" / "serving.md").read_text("utf-8")
    assert alone in readme + guide
    assert set(exports.EXPORTS) == set(TARGETS)
