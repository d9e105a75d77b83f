"""Exported folders: our quantizer loads them, killed exports resume, damage is noticed and named."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import latmix
from latmix import export as exports
from latmix.export import fingerprint, shards, streamed
from latmix.export.source import open_run
from latmix.export.verify import interpreter, record
from latmix.pipeline import restore
from latmix.seal import listed, seal
from latmix.targets import TARGETS
from tests.exported import IDS, WITH_GGUF, Runs, agrees, logits


class TestOurQuantizer:
    def test_weights_stay_packed_and_save_pretrained_round_trips(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("latmix-lu"), "transformers", tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        down = model.model.layers[0].mlp.down_proj
        assert down.weight.dtype == torch.uint8 and down.weight.shape == (1, 64, 48)
        assert model.lm_head.bias is not None
        _round_trips(model, tmp_path / "again")

    def test_save_pretrained_round_trips_learned_online_maps(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("wush", weights="mxint8"), "transformers", tmp_path / "out")
        _round_trips(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), tmp_path / "again")

    def test_generates_with_a_cache_what_it_generates_without(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("quarot"), "transformers", tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        wish = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
        assert torch.equal(model.generate(IDS, **wish), model.generate(IDS, use_cache=False, **wish))

    def test_is_refused_by_a_transformers_without_latmix(self, runs: Runs, tmp_path: Path) -> None:
        """By its model type; and where nobody asks for that, by the shape of what lies under a stock model's names."""
        out = exports.export(runs("rtn", weights="mxfp8_e4m3"), "transformers", tmp_path / "out")
        load = (
            "import transformers\n"
            "for name in ('AutoModelForCausalLM', 'LlamaForCausalLM', 'LlamaModel'):\n"
            "    try:\n"
            f"        getattr(transformers, name).from_pretrained({str(out)!r})\n"
            "    except (ValueError, RuntimeError) as error:\n"
            "        print(name, 'latmix_llama' in str(error), 'mismatched' in str(error))"
        )
        done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
        auto, causal, base = done.stdout.splitlines()
        assert auto == "AutoModelForCausalLM True False"
        assert causal == "LlamaForCausalLM False True" and base == "LlamaModel False True"

    def test_refuses_another_layout(self, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["version"] = 1
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(latmix.LatmixError, match="layout 1; this latmix reads layout 2"):
            transformers.AutoModelForCausalLM.from_pretrained(out)


class TestFolders:
    def test_shards_resume_and_hold_the_same(self, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = runs("gptq")
        whole = load_file(exports.export(run, "transformers", tmp_path / "whole") / "model.safetensors")
        writer = exports.transformers.write_shards
        monkeypatch.setattr(exports.transformers, "write_shards", partial(writer, limit=20_000))
        with monkeypatch.context() as killed:
            killed.setattr(shards, "write", _fail_at(3))
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

    def test_answers_are_the_runs_with_one_layer_in_memory(self, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
        run, there = runs("latmix-lu"), []
        model = streamed.Streamed(open_run(run))
        through = streamed.forward

        def noting(*args: object) -> object:
            full = [name for name, parameter in model.model.named_parameters() if not parameter.is_meta]
            there.append({name.split(".")[2] for name in full if ".layers." in name})
            return through(*args)

        monkeypatch.setattr(streamed, "forward", noting)
        for hidden, rounded in zip(model.hidden((IDS, True), (IDS, False)), (True, False), strict=True):
            expected = logits(restore(run, rounded).model).log_softmax(-1).flatten(0, 1)
            assert torch.equal(model.logprobs(hidden.flatten(0, 1)), expected)
        assert there == [{"0"}, {"0"}, {"1"}, {"1"}]

    def test_an_engines_interpreter_is_found_from_any_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "python").symlink_to(sys.executable)
        assert interpreter("./python") == str(tmp_path / "python")  # as it is: a virtual environment is known by it
        with pytest.raises(latmix.LatmixError, match="'./nothing' cannot be started"):
            interpreter("./nothing")

    def test_leavings_of_a_killed_process_do_not_end_in_the_export(self, runs: Runs, tmp_path: Path) -> None:
        plan = shards.plan_of(runs("rtn"), "transformers", version("latmix"))
        with pytest.raises(KeyboardInterrupt), shards.filling(tmp_path / "out", plan) as partial:
            (partial / ".model.safetensors.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        assert not list(out.glob(".*"))

    def test_a_fingerprint_is_written_whole_or_not_at_all(
        self, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replace = os.replace

        def killed(old: Path, new: Path) -> None:
            if Path(new).name == fingerprint.FILE:
                raise KeyboardInterrupt
            replace(old, new)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            exports.export(runs("rtn"), "transformers", tmp_path / "out")
        assert not (tmp_path / "out.partial" / fingerprint.FILE).exists()
        assert list((tmp_path / "out.partial").glob(".*.tmp"))
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        assert not list(out.glob(".*")) and fingerprint.FILE in listed(out)

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

    @pytest.mark.parametrize("target", [pytest.param(t, marks=WITH_GGUF if t == "gguf" else ()) for t in TARGETS])
    def test_damage_is_named(self, target: str, runs: Runs, tmp_path: Path) -> None:
        out = exports.export(runs("rtn"), target, tmp_path / "out")
        file = out / ("model.gguf" if target == "gguf" else "model.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[:-7])
        with pytest.raises(latmix.LatmixError, match=f"{file.name}' is damaged: its SHA-256 is not"):
            exports.verify(out)
        file.unlink()
        with pytest.raises(latmix.LatmixError, match=f"incomplete: '{file.name}' is missing"):
            exports.verify(out)
        manifest = json.loads((out / "latmix.json").read_text())
        (out / "latmix.json").write_text(json.dumps({**manifest, "version": 9}))
        with pytest.raises(latmix.LatmixError, match="has version 9; this latmix reads version 2"):
            exports.verify(out)
        with pytest.raises(latmix.LatmixError, match="is no export of latmix"):
            exports.verify(tmp_path)

    def test_every_file_is_under_checksum(self, runs: Runs, tmp_path: Path) -> None:
        """Manifest, model card and verdict too, before an engine has loaded the folder and after."""
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        for _ in range(2):
            files = {file.name for file in out.iterdir()}
            assert set(listed(out)) == files - {"SHA256SUMS"} > {"latmix.json", "README.md", "model.safetensors"}
            for name in files:
                whole = (out / name).read_bytes()
                at = len(whole) // 2
                (out / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                with pytest.raises(latmix.LatmixError, match="SHA256SUMS" if name == "SHA256SUMS" else name):
                    exports.open_export(out)
                (out / name).write_bytes(whole)
            verdict = exports.verify(out)
            assert verdict.passed
        assert "verdict.json" in files

        def verified(engine: str) -> None:
            for _ in range(5):
                record(out, engine, dataclasses.replace(verdict, engine=engine))

        with ThreadPoolExecutor() as pool:  # each opens the file that they wait for, as a process does
            list(pool.map(verified, ("vllm", "llama", "one more")))
        exports.open_export(out)
        found = json.loads((out / "verdict.json").read_text())
        assert set(found) == {"transformers", "vllm", "llama", "one more"}
        card = (out / "README.md").read_text()
        assert [engine for engine in found if f"| {engine} " not in card] == []

    @pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "tokenizer.json"])
    def test_a_damaged_half_done_export_is_refused(
        self, name: str, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(fingerprint, "take", killed)
            exports.export(runs("rtn"), "transformers", tmp_path / "out")
        file = tmp_path / "out.partial" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(latmix.LatmixError, match=f"{name}' is not what was written there; remove '.*out.partial'"):
            exports.export(runs("rtn"), "transformers", tmp_path / "out")

    def test_a_damaged_run_is_not_exported(self, runs: Runs, tmp_path: Path) -> None:
        run = Path(shutil.copytree(runs("rtn"), tmp_path / "run"))
        file = run / "quantized-layer-00000.safetensors"
        tensors, scale = load_file(file), "model.layers.0.mlp.up_proj.weight_scale"
        save_file({**tensors, scale: tensors[scale] + 1}, file)
        with pytest.raises(latmix.LatmixError, match=f"{file.name}' is damaged: its SHA-256"):
            exports.export(run, "compressed-tensors", tmp_path / "out")
        for broken, message in (
            ({key: value for key, value in tensors.items() if key != scale}, f"lacks the tensor '{scale}'"),
            ({**tensors, scale: tensors[scale][:, :1].contiguous()}, "does not fit its codes"),
            ({**tensors, scale: torch.full_like(tensors[scale], 255)}, "holds NaN scales"),
            ({**tensors, "stray": torch.zeros(1)}, "'stray', which no export knows"),
        ):
            save_file(broken, file)  # by somebody who knows about the checksums
            seal(run)
            with pytest.raises(latmix.LatmixError, match=message):
                exports.export(run, "compressed-tensors", tmp_path / "out")
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)

    def test_a_model_that_computes_something_else_is_found_out(self, runs: Runs, tmp_path: Path) -> None:
        """The verdict of a folder whose fingerprint is another run's."""
        out = exports.export(runs("rtn"), "transformers", tmp_path / "out")
        other = exports.export(runs("quarot"), "transformers", tmp_path / "other")
        shutil.copy(other / fingerprint.FILE, out)
        seal(out)
        verdict = exports.verify(out)
        assert not verdict.passed and verdict.kl > 1e-3


def _round_trips(model: transformers.PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


def _fail_at(count: int):
    seen = []
    real = shards.write

    def save(*args: object, **kwargs: object) -> None:
        seen.append(args)
        if len(seen) == count:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    return save
