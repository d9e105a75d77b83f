"""How compressed-tensors stores each of our formats, and the `quantization_config` that says so.

Facts about it (0.17 to 0.20) and vLLM 0.32: MX checkpoints whose `input_activations` is null are served by vLLM with
rounded activations all the same where a kernel for that exists, so W4A16 has to be asked for on the command line
(`--linear-backend marlin`). MXFP8's activation scale is RCEIL in vLLM; compressed-tensors doubles it where a block's
largest magnitude is 448 · 2^k exactly. NVFP4's tensor-wide scales are stored as their inverses; that of weights has to
be the same for q, k and v (and gate and up), since vLLM takes the largest of theirs for all; that of activations is a
constant of the checkpoint, while their blocks' scales are found at run time ("local").
"""

from dataclasses import dataclass
from typing import Any

import torch

from latmix.export.source import GLOBAL, PACKED, SCALE, Source
from latmix.transforms import Hadamard


@dataclass(frozen=True)
class Stored:
    """Attributes:
    format: compressed-tensors' word for it.
    codes, dtype: what the tensor of codes is called after its linear, and its type; ours are bytes.
    scales: type of the scales' bytes.
    bits: of a code.
    sign: the sign bits in a byte of codes.
    """

    format: str
    codes: str
    dtype: torch.dtype
    scales: torch.dtype
    bits: int
    sign: int


E4M3 = torch.float8_e4m3fn
STORED = {
    "mxfp4": Stored("mxfp4-pack-quantized", PACKED, torch.uint8, torch.uint8, 4, 0x88),
    "mxfp8_e4m3": Stored("mxfp8-quantized", ".weight", E4M3, torch.uint8, 8, 0x80),
    "nvfp4": Stored("nvfp4-pack-quantized", PACKED, torch.uint8, E4M3, 4, 0x88),
}


def stored(source: Source) -> Stored:
    return STORED[source.layout.weights.name]


def renamed(source: Source, name: str) -> tuple[str, torch.dtype]:
    """Name and type of one of the run's tensors in the checkpoint."""
    if name.endswith(PACKED):
        return name.removesuffix(PACKED) + stored(source).codes, stored(source).dtype
    if name.endswith(GLOBAL):
        return name, torch.float32
    return name, stored(source).scales if name.endswith(SCALE) else torch.bfloat16


def quantization_config(source: Source) -> dict[str, Any]:
    scheme = {
        "num_bits": stored(source).bits,
        "type": "float",
        "symmetric": True,
        "strategy": "group" if stored(source).scales == torch.uint8 else "tensor_group",
        "group_size": source.layout.weights.block,
        "scale_dtype": str(stored(source).scales),
    }
    rounded = {**scheme, "dynamic": True if stored(source).scales == torch.uint8 else "local"}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": stored(source).format,
        "quantization_status": "compressed",
        "ignore": [source.arch.head],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "dynamic": False},
                "input_activations": None if source.layout.activations is None else rounded,
                "output_activations": None,
                "format": stored(source).format,
            }
        },
    }
    if source.layout.online:
        config["transform_config"] = {"config_groups": {spot: _online(source, spot) for spot in source.layout.online}}
    return config


def order_of(source: Source, spot: str) -> int:
    """Of the Hadamard matrix at that input."""
    map = source.maps.online(spot, 0)
    assert isinstance(map, Hadamard)
    ((order, _),) = map.segments  # a tail would need a width that no multiple of the block has
    return order


def _online(source: Source, spot: str) -> dict[str, Any]:
    targets = [f"re:.*{reader.replace('.', '[.]')}$" for reader in source.arch.input(spot).readers]
    apply = {"targets": targets, "location": "input", "inverse": False}
    return {"type": "hadamard", "head_dim": order_of(source, spot), "apply": [apply]}
