"""compressed-tensors: what stock vLLM loads, and transformers with that package.

The run's packed codes and scale bytes are its already and are copied (`schemes` has the names). Added are zero biases
where a stock model has either all of a group's biases or none, and the online transform as a `transform_config`. A
randomised Hadamard before down_proj is served as a plain one: its signs fold into the rows of up_proj, whose codes
carry a sign bit, so nothing is rounded again.

Facts about the format: vLLM divides a stored transform by √size, so the matrix has entries ±1; all linears of a
config group share one tensor in memory, whichever of them it is read for, so it is stored at the first layer alone.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latmix.export.base import EXPORTS, Export
from latmix.export.schemes import order_of, quantization_config, renamed, stored
from latmix.export.shards import Piece, write_shards
from latmix.export.source import GLOBAL, PACKED, Source, zeros
from latmix.progress import Progress
from latmix.rundir import write_json
from latmix.targets import ATTENTION, MLP, family
from latmix.transforms import Hadamard


def write(source: Source, folder: Path, progress: Progress) -> None:
    write_shards(list(pieces(source)), folder, progress)
    write_json(folder / "config.json", stock_config(source) | {"quantization_config": quantization_config(source)})


def pieces(source: Source) -> Iterator[Piece]:
    """Every tensor of the checkpoint, in the run's order, then what is added."""
    flips = signs(source)
    for name, shape in source.shapes.items():
        new, dtype = renamed(source, name)
        shape = shape or (1,)  # a tensor-wide scale
        flip = flips is not None and re.search(r"\.mlp\.up_proj\.(weight_packed|bias)$", name)
        yield Piece(new, shape, dtype, partial(_made, source, name, dtype, flips if flip else None))
    yield from missing_biases(source)
    yield from input_scales(source)
    for spot in source.layout.online:
        order, reader = order_of(source, spot), source.arch.input(spot).readers[0]
        name = f"{source.arch.layers}.0.{reader}.{spot}_input.weight"
        yield Piece(name, (order, order), torch.bfloat16, partial(_sylvester, order))


def _made(source: Source, name: str, dtype: torch.dtype, flips: Tensor | None) -> Tensor:
    """The tensor under its new type, the signs of some rows turned."""
    tensor = source.tensor(name)
    if name.endswith(GLOBAL):
        return 1 / tensor.reshape(1)
    if flips is not None and name.endswith(PACKED):
        tensor = torch.where(flips.unsqueeze(1), tensor ^ stored(source).sign, tensor)
    elif flips is not None:
        tensor = torch.where(flips, -tensor, tensor)
    return tensor.view(dtype)


def _sylvester(order: int) -> Tensor:
    return Hadamard(order, order).matrix().mul(order**0.5).round().to(torch.bfloat16)


def signs(source: Source) -> Tensor | None:
    """Which inputs of down_proj the online Hadamard negates; None where it has no signs."""
    if "down" not in source.layout.online:
        return None
    map = source.maps.online("down", 0)
    assert isinstance(map, Hadamard)
    return None if map.signs is None else map.signs < 0


def missing_biases(source: Source) -> Iterator[Piece]:
    """A stock model has all biases of attention (or MLP) or none."""
    stock = family(source.layout).name
    groups = (ATTENTION, MLP) if stock == "llama" else (ATTENTION,) if stock == "qwen3" else ()
    for group in groups:
        if not group & source.layout.biases:
            continue
        for path in source.linears():
            if path.endswith(tuple(group)) and f"{path}.bias" not in source.shapes:
                rows = source.shapes[path + PACKED][0]
                yield Piece(f"{path}.bias", (rows,), torch.bfloat16, partial(zeros, rows))


def input_scales(source: Source) -> Iterator[Piece]:
    """Of NVFP4's activations, the tensor-wide one at each linear."""
    if (format := source.layout.activations) is not None and format.tensor_scale is not None:
        for path in source.linears():
            yield Piece(f"{path}.input_global_scale", (1,), torch.float32, partial(_inverse, format.tensor_scale))


def _inverse(scale: float) -> Tensor:
    return torch.tensor([1 / scale])


def stock_config(source: Source) -> dict[str, Any]:
    """The `config.json` of a stock model with room for the run's biases."""
    arch, config = family(source.layout), dict(source.config)
    if arch is not source.arch:  # Llama in place of Mistral or Qwen2
        for key in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            config.pop(key, None)
        heads = config["num_attention_heads"]
        config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    if arch.name in ("llama", "qwen3"):
        config["attention_bias"] = bool(ATTENTION & source.layout.biases)
    if arch.name == "llama":
        config["mlp_bias"] = bool(MLP & source.layout.biases)
    return config | {
        "model_type": arch.name,
        "architectures": [arch.causal_lm],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def serve(folder: Path, activations: str | None) -> str:
    return f"vllm serve {folder}" + ("" if activations else " --linear-backend marlin")


def engines(source: Source) -> tuple[str, ...]:
    """transformers ignores `transform_config`, without a word; vLLM takes NVFP4 weights alone on GPUs only."""
    if source.layout.weights.name == "nvfp4" and source.layout.activations is None:
        return ("transformers",)
    return ("vllm",) if source.layout.online else ("vllm", "transformers")


EXPORTS.add("compressed-tensors", Export(write, serve, engines))
