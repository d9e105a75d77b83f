"""Exports: every recipe × target works and is verified, or is refused with the reason; damage is noticed.

The engines themselves are too large for this suite. What stands in: transformers runs for real; vLLM by its stock
architecture, filled by a reader that shares no code with latmix (the plugin's arithmetic, tests/engines); llama.cpp by
the gguf package's own decoder. `tests/test_engines.py` runs the engines where they are installed.
"""

import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import latmix
from latmix import export as exports
from latmix.export import fingerprint, shards
from latmix.export.gguf import LINEARS
from latmix.export.source import open_run
from latmix.pipeline import restore
from latmix.recipe import override
from latmix.recipes import RECIPES, find
from latmix.targets import TARGETS
from tests.engines.vllm_cpu_mxfp4.vllm_cpu_mxfp4 import decoded, hadamard, rounded
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION

IDS = torch.arange(3, 51).view(2, 24)
WITH_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")


class Runs:
    """Runs of a tiny model, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, recipe: str, family: str = "llama", **changes: str) -> Path:
        name = "-".join([recipe, family, *changes.values()]).replace(":", "_").replace("=", "_")
        if not (model := self.folder / family).exists():
            save_tiny(model, family)
        if not (out := self.folder / name).exists():
            latmix.quantize(model, out, recipe, CALIBRATION, 0, settings(recipe) | changes)
        return out


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def stock(folder: Path) -> transformers.PreTrainedModel:
    """A compressed-tensors folder as stock vLLM reads it: its config's architecture, nothing of ours."""
    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = config.quantization_config
    assert quantization["format"] == "mxfp4-pack-quantized"
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    online = quantization.get("transform_config", {"config_groups": {}})["config_groups"]
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path not in quantization["ignore"]:
            packed, scale = tensors.pop(f"{path}.weight_packed"), tensors.pop(f"{path}.weight_scale")
            tensors[f"{path}.weight"] = decoded(packed, scale)
            for name, group in online.items():
                if any(path.endswith(target[5:-1].replace("[.]", ".")) for target in group["apply"][0]["targets"]):
                    matrix, order = tensors.pop(f"{path}.{name}_input.weight"), group["head_dim"]
                    assert torch.allclose(matrix.float(), hadamard(torch.eye(order)) * order**0.5)
                    assert module.bias is None  # vLLM asserts it
                    module.register_forward_pre_hook(partial(_turned, order=order))
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def _turned(module: torch.nn.Module, args: tuple[torch.Tensor], order: int) -> tuple[torch.Tensor]:
    return (hadamard(args[0].unflatten(-1, (-1, order))).flatten(-2),)


def agrees(target: str, folder: Path, run: Path) -> None:
    reference = restore(run)
    if target == "gguf":
        _gguf_agrees(folder, run, reference.model)
        return
    if target == "transformers":
        verdict = exports.verify(folder)
        assert verdict.passed and verdict.kl < 1e-6 and verdict.greedy >= 20
        assert json.loads((folder / "verdict.json").read_text())["transformers"]["passed"]
        assert "| yes |" in (folder / "README.md").read_text()
        found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        found = stock(folder)
    # roundings fall the same way almost everywhere; a sum in another order can turn one
    assert (logits(found) - logits(reference.model)).abs().median() < 1e-4


def _gguf_agrees(folder: Path, run: Path, reference: transformers.PreTrainedModel) -> None:
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    config = reference.config
    for index in range(config.num_hidden_layers):
        for ours, theirs in LINEARS.items():
            place = reference.get_submodule(f"model.layers.{index}.{ours}")
            for kind in ("weight",) if place.bias is None else ("weight", "bias"):
                stored = tensors.pop(f"blk.{index}.{theirs}.{kind}")
                values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
                if theirs in ("attn_q", "attn_k") and config.model_type != "qwen3":
                    heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                    halves = values.reshape(heads, -1, 2, *values.shape[1:])
                    values = halves.transpose(1, 2).reshape(values.shape)
                assert torch.equal(values, getattr(place, kind)), (ours, kind)
    assert all(not name.startswith("blk.") or "norm" in name for name in tensors)


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


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
def test_transformers_with_compressed_tensors_computes_the_same(runs: Runs, tmp_path: Path) -> None:
    out = exports.export(runs("gptq"), "compressed-tensors", tmp_path / "out")
    verdict = exports.verify(out, "transformers")
    assert verdict.passed and verdict.kl < 1e-6 and verdict.greedy >= 20
    online = exports.export(runs("quarot"), "compressed-tensors", tmp_path / "online")
    with pytest.raises(latmix.LatmixError, match="engine 'transformers' cannot serve"):  # it would compute nonsense
        exports.verify(online, "transformers")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("target", ["compressed-tensors", "transformers"])
def test_every_family_is_served_with_what_its_stock_form_can_hold(
    family: str, target: str, runs: Runs, tmp_path: Path
) -> None:
    run = runs("latmix-lu", family, target=target)
    agrees(target, exports.export(run, target, tmp_path / "out"), run)


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
    ],
)
def test_formats_that_engines_lack_are_refused(
    changes: dict[str, str], message: str, runs: Runs, tmp_path: Path
) -> None:
    with pytest.raises(latmix.LatmixError, match=message):
        exports.export(runs("rtn", **changes), "compressed-tensors", tmp_path / "out")


def test_widths_that_no_block_divides_are_refused_before_anything_is_learned(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", intermediate_size=172)
    with pytest.raises(latmix.LatmixError, match="cannot serve this: a linear's input width of 172"):
        latmix.quantize(model, tmp_path / "run", "gptq", CALIBRATION, 0, settings("gptq") | {"target": "gguf"})
    run = latmix.quantize(model, tmp_path / "run", "rtn", CALIBRATION, 0, settings("rtn"))
    with pytest.raises(latmix.LatmixError, match="input width of 172 is no multiple of the block of 32"):
        exports.export(run.path, "compressed-tensors", tmp_path / "out")
    agrees("transformers", exports.export(run.path, "transformers", tmp_path / "out"), run.path)


class TestOurQuantizer:
    def test_weights_stay_packed_and_save_pretrained_round_trips(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("latmix-lu"), "transformers", tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        down = model.model.layers[0].mlp.down_proj
        assert down.weight_packed.dtype == torch.uint8 and down.weight_packed.shape == (64, 48)
        assert model.lm_head.bias is not None and not hasattr(down, "weight")
        model.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert torch.equal(logits(again), logits(model))

    def test_generates_with_a_cache_what_it_generates_without(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("quarot"), "transformers", tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        wish = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        assert torch.equal(model.generate(IDS, **wish), model.generate(IDS, use_cache=False, **wish))

    def test_is_unknown_to_a_transformers_without_latmix(self, runs: Runs, tmp_path: Path) -> None:
        import subprocess
        import sys

        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        load = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
        done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
        assert done.returncode != 0 and "latmix_llama" in done.stderr

    def test_refuses_another_layout(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["version"] = 2
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(latmix.LatmixError, match="layout 2; this latmix reads layout 1"):
            transformers.AutoModelForCausalLM.from_pretrained(out)


class TestFolders:
    def test_shards_resume_and_hold_the_same(self, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = runs("gptq")
        whole = load_file(exports.export(run, "transformers", tmp_path / "whole") / "model.safetensors")
        writer = exports.transformers.write_shards
        monkeypatch.setattr(exports.transformers, "write_shards", partial(writer, limit=20_000))
        with monkeypatch.context() as killed:
            killed.setattr(shards, "save_file", _fail_at(3))
            with pytest.raises(KeyboardInterrupt):
                exports.export(run, "transformers", tmp_path / "out")
        first = (
            tmp_path / "out.partial" / next(iter(sorted(p.name for p in (tmp_path / "out.partial").glob("*-0000*"))))
        )
        written = first.stat().st_mtime_ns
        out = exports.export(run, "transformers", tmp_path / "out")
        assert (out / first.name).stat().st_mtime_ns == written  # not written again
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(index.values())) > 3 and set(index) == set(whole)
        for name, file in index.items():
            assert torch.equal(load_file(out / file)[name], whole[name])
        agrees("transformers", out, run)

    def test_another_exports_leavings_are_not_resumed(self, runs: Runs, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "plan.json").write_text('{"target": "gguf"}')
        with pytest.raises(latmix.LatmixError, match="another export's"):
            exports.export(runs("rtn"), "transformers", tmp_path / "out")

    def test_an_existing_folder_is_left_alone(self, runs: Runs, tmp_path: Path) -> None:
        with pytest.raises(latmix.LatmixError, match="exists; choose another --out"):
            exports.export(runs("rtn"), "transformers", tmp_path)
        with pytest.raises(latmix.LatmixError, match="Unknown target 'onnx'; known: compressed-tensors, transformers"):
            exports.export(runs("rtn"), "onnx", tmp_path / "out")
        with pytest.raises(latmix.LatmixError, match="is not a run directory"):
            exports.export(tmp_path, "gguf", tmp_path / "out")

    def test_weights_take_four_and_a_quarter_bits(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("gptq"), "compressed-tensors", tmp_path / "out")
        tensors, manifest = load_file(out / "model.safetensors"), exports.open_export(out)
        packed = sum(tensor.nbytes for name, tensor in tensors.items() if ".weight_" in name)
        assert 8 * packed / manifest["weights"] == pytest.approx(4.25, rel=0.005)

    def test_damage_is_named(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        file = out / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-7])
        with pytest.raises(latmix.LatmixError, match="model.safetensors' is cut short or changed"):
            exports.verify(out)
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(latmix.LatmixError, match="has been changed since the export"):
            exports.verify(out)
        file.unlink()
        with pytest.raises(latmix.LatmixError, match="incomplete: 'model.safetensors' is missing"):
            exports.verify(out)
        manifest = json.loads((out / "latmix.json").read_text())
        (out / "latmix.json").write_text(json.dumps({**manifest, "version": 9}))
        with pytest.raises(latmix.LatmixError, match="has version 9; this latmix reads version 1"):
            exports.verify(out)
        with pytest.raises(latmix.LatmixError, match="is no export of latmix"):
            exports.verify(tmp_path)

    def test_a_damaged_run_is_not_exported(self, runs: Runs, tmp_path: Path) -> None:
        run = Path(shutil.copytree(runs("rtn"), tmp_path / "run"))
        file = run / "quantized.safetensors"
        tensors, scale = load_file(file), "model.layers.0.mlp.up_proj.weight_scale"
        for broken, message in (
            ({key: value for key, value in tensors.items() if key != scale}, f"lacks the tensor '{scale}'"),
            ({**tensors, scale: tensors[scale][:, :1].contiguous()}, "does not fit its codes"),
            ({**tensors, scale: torch.full_like(tensors[scale], 255)}, "holds NaN scales"),
            ({**tensors, "stray": torch.zeros(1)}, "'stray', which no export knows"),
        ):
            save_file(broken, file)
            with pytest.raises(latmix.LatmixError, match=message):
                exports.export(run, "compressed-tensors", tmp_path / "out")
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)

    def test_a_model_that_computes_something_else_is_found_out(self, runs: Runs, tmp_path: Path) -> None:
        """The verdict of a folder whose fingerprint is another run's."""
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        other = exports.export(runs("quarot"), "transformers", tmp_path / "other")
        shutil.copy(other / fingerprint.FILE, out)
        manifest = json.loads((out / "latmix.json").read_text())
        manifest["files"][fingerprint.FILE] = json.loads((other / "latmix.json").read_text())["files"][fingerprint.FILE]
        (out / "latmix.json").write_text(json.dumps(manifest))
        verdict = exports.verify(out)
        assert not verdict.passed and verdict.kl > 1e-3


def _fail_at(count: int):
    seen = []
    real = shards.save_file

    def save(*args: object, **kwargs: object) -> None:
        seen.append(args)
        if len(seen) == count:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    return save


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
    assert set(exports.EXPORTS) == set(TARGETS)
