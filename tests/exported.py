"""What tests of exports share: runs of tiny models, and readers of the folders that share no code with latmix."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import latmix
from latmix import export as exports
from latmix.export.gguf import LINEARS
from latmix.pipeline import restore
from latmix.seal import seal
from tests.engines.vllm_cpu_mxfp4.vllm_cpu_mxfp4 import (
    decoded,
    decoded8,
    decoded_nv,
    hadamard,
    rounded,
    rounded8,
    rounded_nv,
)
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION

WITH_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
IDS = torch.arange(3, 51).view(2, 24)
ARITHMETIC = {
    "mxfp4-pack-quantized": (".weight_packed", decoded, rounded),
    "mxfp8-quantized": (".weight", decoded8, rounded8),
    "nvfp4-pack-quantized": (".weight_packed", decoded_nv, rounded_nv),
}
"""Format → what follows a linear's name, how it is decoded, how activations are rounded."""


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
            with_random_biases(out, 0.1)
        return out


def with_random_biases(run: Path, deviation: float) -> None:
    """As short as tests learn, a run may keep the biases that it began with: zeros, which prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for file in sorted(run.glob("quantized-*.safetensors")):
        tensors = load_file(file)
        for name in sorted(name for name in tensors if name.endswith(".bias")):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).mul(deviation).to(tensors[name].dtype)
        save_file(tensors, file)
    seal(run)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def stock(folder: Path) -> transformers.PreTrainedModel:
    """A compressed-tensors folder as stock vLLM reads it: its config's architecture, nothing of ours."""
    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = config.quantization_config
    codes, decode, round_ = ARITHMETIC[quantization["format"]]
    (scheme,) = quantization["config_groups"].values()
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
    online = quantization.get("transform_config", {"config_groups": {}})["config_groups"]
    for name, group in online.items():
        (stored,) = [key for key in tensors if key.endswith(f".{name}_input.weight")]  # once, for all that share it
        matrix, order = tensors.pop(stored), group["head_dim"]
        assert torch.allclose(matrix.float(), hadamard(torch.eye(order)) * order**0.5)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path not in quantization["ignore"]:
            weight, input_ = (_popped(tensors, f"{path}.{kind}_global_scale") for kind in ("weight", "input"))
            stored = tensors.pop(path + codes), tensors.pop(f"{path}.weight_scale")
            tensors[f"{path}.weight"] = decode(*stored, *(1 / inverse for inverse in weight))
            for group in online.values():
                if any(path.endswith(target[5:-1].replace("[.]", ".")) for target in group["apply"][0]["targets"]):
                    assert module.bias is None  # vLLM asserts it
                    module.register_forward_pre_hook(partial(_turned, order=group["head_dim"]))
            if scheme["input_activations"]:
                module.register_forward_pre_hook(lambda _, args, more=input_: (round_(args[0], *more),))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def _popped(tensors: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    return [tensors.pop(name)] if name in tensors else []


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
