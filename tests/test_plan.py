"""Plans against what really happened: sizes of real runs, peaks of their stages, and a model no laptop could load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import latmix
from latmix.analysis.plan import Plan, plan
from latmix.archs import ARCHS
from latmix.assets import DEMO_MODEL
from latmix.eval import size_of
from latmix.model.load import load_tokenizer
from latmix.recipe import override
from latmix.recipes import find
from tests.models import tiny
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize("family", list(ARCHS))
@pytest.mark.parametrize("recipe", ["gptq", "latmix-lu"])
def test_predicted_size_is_the_real_size(family: str, recipe: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family, tied=family == "qwen2")
    run = latmix.quantize(model, tmp_path / "run", recipe, CALIBRATION, 0, settings(recipe))
    (predicted,) = plan(model, recipe, (run.recipe.weights,)).checkpoints[1:]
    assert predicted.disk == pytest.approx(size_of(run.path, 1).bytes, rel=0.01)


@pytest.mark.parametrize("format", ["mxfp6_e2m3", "mxint8", "nvfp4", "mxfp4:block=16"])
def test_predicted_size_of_other_formats(format: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    run = latmix.quantize(model, tmp_path / "run", "rtn", CALIBRATION, 0, {**settings("rtn"), "weights": format})
    (predicted,) = plan(model, "rtn", (format,)).checkpoints[1:]
    assert predicted.disk == pytest.approx(size_of(run.path, 1).bytes, rel=0.01)


PEAK = """
import sys
from latmix.analysis.plan import plan
print(max(plan(sys.argv[1], sys.argv[2], ("mxfp4",)).work.peak.values()))
"""


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "head_dim": 64}


@pytest.mark.parametrize(("wide", "recipe"), [(False, "gptq"), (False, "latmix-lu"), (True, "gptq")])
def test_predicted_peak_is_near_the_measured_one(wide: bool, recipe: str, tmp_path: Path) -> None:
    """Both in processes of their own, as users have them. Of the model that ships with latmix most is Python and its
    packages; of the wider one, half. More sizes: benchmarks/plan.py."""
    model = DEMO_MODEL
    if wide:
        model = tmp_path / "wide"
        tiny("llama", vocab_size=8192, max_position_embeddings=256, **WIDE).save_pretrained(model)
        load_tokenizer(DEMO_MODEL).save_pretrained(model)
    short = {"calibration.windows": "8", "calibration.held_out": "8"}
    short |= {"learning.steps": "2"} if recipe == "latmix-lu" else {}
    (tmp_path / "recipe.json").write_text(override(find(recipe), short).to_json())
    words = ["--out", tmp_path / "run", "--recipe", tmp_path / "recipe.json"]
    subprocess.run([sys.executable, "-m", "latmix", "quantize", model, *words], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, model, tmp_path / "recipe.json"], check=True, capture_output=True, text=True
    )
    stages = json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
    assert int(done.stdout) == pytest.approx(max(stage["peak_bytes"] for stage in stages.values()), rel=0.15)


def test_seventy_billion_do_not_fit_a_24_gb_card(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    found: Plan = plan(tmp_path, "gptq", ("mxfp4",))
    full, four_bits = found.checkpoints
    assert found.parameters == 70_553_706_496
    assert full.disk == pytest.approx(141.1e9, rel=0.01)
    linears, kept = found.quantized * 4.25 / 8, 2 * (found.parameters - found.quantized)
    assert four_bits.device == pytest.approx(linears + kept, rel=1e-6)
    assert found.longest_context(four_bits, 24e9) == 0
    assert found.cache_per_token == 2 * 80 * 8 * 128 * 2
    assert found.longest_context(four_bits, 48e9) == int((48e9 - four_bits.device) // found.cache_per_token)


@pytest.mark.parametrize(("recipe", "stage"), [("latmix-plus", "learn"), ("block-hadamard", "tune")])
def test_keys_and_values_of_text_that_is_generated_are_counted(recipe: str, stage: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 512, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, **shape}))
    short = {"calibration.window": "1024", "calibration.windows": "8"}
    short |= {"tuning.batch": "1"} | ({"learning.batch": "1"} if stage == "learn" else {})
    peaks = {}
    for count in ("0", "8"):
        found = plan(tmp_path, override(find(recipe), {**short, "calibration.generated": count}), ("mxfp4",))
        peaks[count] = found.work.peak[stage]
    cache = 64 * 1024 * 2 * found.cache_per_token  # in float32
    assert peaks["0"] < cache < peaks["8"] < 1.5 * cache


def test_what_cannot_be_planned_is_named(tmp_path: Path) -> None:
    with pytest.raises(latmix.LatmixError, match="is not a folder"):
        plan(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "hidden_size": "wide"}))
    with pytest.raises(latmix.LatmixError, match="says hidden_size is 'wide'"):
        plan(tmp_path)


def test_a_longer_recipe_is_predicted_to_cost_more(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    by_recipe = {name: plan(model, name, ("mxfp4",)).work for name in ("rtn", "gptq", "latmix-lu")}
    assert set(by_recipe["rtn"].peak) == {"quantize", "measure"} and "learn" in by_recipe["latmix-lu"].peak
    assert sum(by_recipe["rtn"].seconds.values()) < sum(by_recipe["latmix-lu"].seconds.values())
