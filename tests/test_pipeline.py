"""Runs from end to end on a tiny model: what a run holds, that it reloads as measured, that bad input costs nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import latmix
from latmix.archs import ARCHS
from latmix.assets import DEMO_MODEL
from latmix.data import calibration_windows, read_text
from latmix.eval import score
from latmix.model.load import load, load_tokenizer
from latmix.pipeline import restore
from latmix.recipe import override
from latmix.recipes import RECIPES, find
from latmix.seal import seal
from tests.models import tiny
from tests.texts import CALIBRATION, OTHER

FAST = {
    "calibration.windows": "6",
    "calibration.held_out": "2",
    "calibration.window": "32",
    "layerwise.epochs": "1",
    "calibration.generated": "3",
    "learning.steps": "3",
    "learning.batch": "2",
    "tuning.steps": "3",
    "tuning.batch": "2",
}


def settings(recipe: str) -> dict[str, str]:
    return {key: value for key, value in FAST.items() if getattr(find(recipe), key.partition(".")[0]) is not None}


def shards(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("quantized-*.safetensors")}


def save_tiny(folder: Path, family: str = "llama", **options: object) -> Path:
    tiny(family, vocab_size=2048, **options).save_pretrained(folder)
    load_tokenizer(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("recipe", RECIPES.names())
def test_every_recipe_runs_and_reloads_exactly_as_measured(recipe: str, model: Path, tmp_path: Path) -> None:
    run = latmix.quantize(model, tmp_path / "run", recipe, CALIBRATION, 0, settings(recipe))
    reloaded, original = restore(run.path), load(model)
    corpus = read_text(CALIBRATION)
    _, held_out = calibration_windows(
        corpus, original.tokenizer, run.recipe.calibration, original.longest, original.vocabulary
    )
    again = score(reloaded.model, held_out, original.model)
    measured = run.summary["held_out"]
    assert again.perplexity.mean == pytest.approx(measured["perplexity"]["mean"], rel=1e-5)
    assert again.kl is not None and again.kl.mean == pytest.approx(measured["kl"]["mean"], rel=1e-3, abs=1e-5)
    assert run.summary["size"]["bits_per_weight"] == pytest.approx(4.25)
    stages = {"load", "learn", "fold", "quantize", "save", "measure"} | ({"tune"} if run.recipe.tuning else set())
    assert set(run.summary["stages"]) == stages
    assert json.loads((run.path / "recipe.json").read_text()) == json.loads(run.recipe.to_json())
    assert (run.path / "metrics.jsonl").exists() == bool(run.recipe.learning)


@pytest.mark.parametrize("family", list(ARCHS))
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_runs(family: str, tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, tied=tied)
    run = latmix.quantize(folder, tmp_path / "run", "latmix-qr", CALIBRATION, 0, settings("latmix-qr"))
    result = latmix.evaluate(run.path, OTHER, reference=folder)
    assert result.kl is not None and 0 < result.kl.low <= result.kl.mean <= result.kl.high


def test_same_seed_same_bytes_and_another_seed_another_map(model: Path, tmp_path: Path) -> None:
    changed = {**settings("latmix-lu"), "folded.residual": "lu:init=random-rotation"}
    runs = [
        latmix.quantize(model, tmp_path / f"{i}", "latmix-lu", CALIBRATION, s, changed) for i, s in enumerate((0, 0, 1))
    ]
    files = [(run.path / "transforms.safetensors").read_bytes() for run in runs]
    packed = [shards(run.path) for run in runs]
    assert files[0] == files[1] and packed[0] == packed[1]
    assert files[0] != files[2]


@pytest.mark.parametrize("format", ["mxint4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8", "nvfp4", "mxfp4:block=16"])
def test_every_format_reloads(format: str, model: Path, tmp_path: Path) -> None:
    chosen = {**settings("gptq"), "weights": format, "activations": format}
    run = latmix.quantize(model, tmp_path / "run", "gptq", CALIBRATION, 0, chosen)
    result = latmix.evaluate(run.path, OTHER, reference=model)
    measured = run.summary["held_out"]["kl"]["mean"]
    assert result.kl is not None and result.kl.mean == pytest.approx(measured, rel=1.0)
    if not format.startswith("nvfp4"):
        expected = latmix.numerics.parse_format(format).bits_per_element
        assert result.bits_per_weight == pytest.approx(expected, rel=0.01)


def test_recipe_values_and_files_are_accepted(model: Path, tmp_path: Path) -> None:
    recipe = override(find("gptq"), settings("gptq"))
    (tmp_path / "mine.json").write_text(recipe.to_json())
    by_value = latmix.quantize(model, tmp_path / "a", recipe, CALIBRATION)
    by_file = latmix.quantize(model, tmp_path / "b", str(tmp_path / "mine.json"), CALIBRATION)
    assert by_value.recipe == by_file.recipe
    assert shards(by_value.path) == shards(by_file.path)


def test_an_unquantized_model_against_itself_diverges_by_nothing(model: Path) -> None:
    result = latmix.evaluate(model, OTHER, reference=model, window=32)
    assert result.kl is not None and result.kl.mean == 0.0
    assert result.top1_agreement is not None and result.top1_agreement.mean == 1.0
    assert result.bits_per_weight is None
    assert latmix.evaluate(model, OTHER, window=32).kl is None


class TestBadInput:
    """One sentence that names the culprit, and nothing left behind."""

    def fails(self, message: str, model: Path, out: Path, **changes: object) -> None:
        arguments = {"recipe": "gptq", "calibration": CALIBRATION, "settings": settings("gptq"), **changes}
        with pytest.raises(latmix.LatmixError, match=message):
            latmix.quantize(model, out, **arguments)
        assert not out.exists() and not out.with_name(out.name + ".partial").exists()

    def test_models(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.fails("is not a folder", tmp_path / "nowhere", out)
        (tmp_path / "empty").mkdir()
        self.fails("config.json' is missing", tmp_path / "empty", out)
        broken = Path(shutil.copytree(model, tmp_path / "broken"))
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
        self.fails("Unknown architecture 'mamba'; known: llama, mistral, qwen2, qwen3", broken, out)
        (broken / "config.json").write_text("{")
        self.fails("cannot be read as JSON", broken, out)

    def test_weights(self, model: Path, tmp_path: Path) -> None:
        out, broken = tmp_path / "out", Path(shutil.copytree(model, tmp_path / "broken"))
        shard = broken / "model.safetensors"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-100])
        self.fails("cut short or damaged", broken, out)
        shard.write_bytes(whole[:5])
        self.fails("cut short or is no safetensors file", broken, out)
        shard.write_bytes(whole)
        tensors = load_file(shard)
        name = "model.layers.0.mlp.up_proj.weight"
        damaged = tensors[name].clone()
        damaged[3, 5] = float("nan")
        save_file({**tensors, name: damaged}, shard, metadata={"format": "pt"})
        self.fails(f"'{name}' in .* holds NaN", broken, out)
        save_file({key: value for key, value in tensors.items() if key != name}, shard, metadata={"format": "pt"})
        self.fails(f"lacks 1 tensors, among them '{name}'", broken, out)
        shard.unlink()
        self.fails("is incomplete: 'model.safetensors' is missing", broken, out)

    def test_words(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.fails("Unknown recipe 'best'; known: rtn", model, out, recipe="best")
        self.fails("Unknown recipe key 'steps'", model, out, settings={"steps": "3"})
        self.fails("Unknown format 'fp4'; known: mxfp4", model, out, settings={**settings("gptq"), "weights": "fp4"})
        self.fails("Unknown weight quantizer", model, out, settings={"quantizer": "awq"})
        self.fails("Unknown transform 'spin'", model, out, settings={**settings("gptq"), "folded.residual": "spin"})
        self.fails("asks for 256", model, out, calibration=OTHER, settings={"calibration.window": "4096"})

    def test_an_existing_output_is_left_alone(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "precious").write_text("kept")
        with pytest.raises(latmix.LatmixError, match="exists; choose another --out"):
            latmix.quantize(model, out, "gptq", CALIBRATION, settings=settings("gptq"))
        assert (out / "precious").read_text() == "kept"

    def test_damaged_runs(self, model: Path, tmp_path: Path) -> None:
        run = latmix.quantize(model, tmp_path / "run", "rtn", CALIBRATION, settings=settings("rtn"))
        file = run.path / "quantized-layer-00000.safetensors"
        tensors, whole = load_file(file), file.read_bytes()
        save_file({key: value for key, value in tensors.items() if "down_proj.weight_scale" not in key}, file)
        seal(run.path)
        with pytest.raises(latmix.LatmixError, match=r"lacks the tensor '.*down_proj.weight_scale'"):
            restore(run.path)
        save_file({**tensors, "extra": torch.zeros(1)}, file)
        seal(run.path)
        with pytest.raises(latmix.LatmixError, match="holds 'extra', which does not fit"):
            restore(run.path)
        file.write_bytes(whole)
        seal(run.path)
        (run.path / "transforms.safetensors").write_bytes(b"short")
        seal(run.path)
        with pytest.raises(latmix.LatmixError, match="transforms in .* cannot be loaded"):
            restore(run.path)
