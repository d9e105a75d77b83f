"""Our own checkpoint for transformers: whatever a run holds, packed, loaded by the quantizer in `latmix.packed`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latmix.export.base import EXPORTS, Export
from latmix.export.shards import Piece, write_shards
from latmix.export.source import GLOBAL, PACKED, SCALE, Source
from latmix.packed import METHOD, PREFIX, VERSION, class_name
from latmix.progress import Progress
from latmix.rundir import write_json


def write(source: Source, folder: Path, progress: Progress) -> None:
    write_shards(list(pieces(source)), folder, progress)
    config = source.config | {
        "model_type": f"{PREFIX}{source.arch.name}",
        "architectures": [class_name(source.arch)],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "quantization_config": quantization_config(source),
    }
    write_json(folder / "config.json", config)


def pieces(source: Source) -> Iterator[Piece]:
    """The run's tensors, codes with an axis more (`latmix.packed`), and those of online transforms at their linears."""
    for name, shape in source.shapes.items():
        if name.endswith(PACKED):
            codes = f"{name.removesuffix(PACKED)}.weight"
            yield Piece(codes, (1, *shape), torch.uint8, partial(_codes, source, name))
            continue
        dtype = torch.uint8 if name.endswith(SCALE) else torch.float32 if name.endswith(GLOBAL) else torch.bfloat16
        yield Piece(name, shape, dtype, partial(source.tensor, name))
    for spot in source.layout.online:
        for index in range(source.layers):
            map = source.maps.online(spot, index)
            assert map is not None
            for key, tensor in map.state_dict().items():
                for reader in source.arch.input(spot).readers:
                    path = f"{source.arch.layers}.{index}.{reader}.online.{key}"
                    yield Piece(path, tuple(tensor.shape), tensor.dtype, partial(_same, tensor))


def _codes(source: Source, name: str) -> Tensor:
    return source.tensor(name).unsqueeze(0)


def _same(tensor: Tensor) -> Tensor:
    return tensor.clone()


def quantization_config(source: Source) -> dict[str, Any]:
    place = {"block": source.layout.block, "seed": source.recipe.seed}
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "weights": source.recipe.weights,
        "activations": source.recipe.activations,
        "online": {spot: {"spec": spec, **place} for spot, spec in source.layout.online.items()},
        "biases": [name.removesuffix(".bias") for name in source.shapes if name.endswith(".bias")],
    }


def serve(folder: Path, activations: str | None) -> str:
    return (
        "import latmix, transformers\n\n"
        f'model = transformers.AutoModelForCausalLM.from_pretrained("{folder}")\n'
        f'tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")'
    )


def engines(source: Source) -> tuple[str, ...]:
    return ("transformers",)


EXPORTS.add("transformers", Export(write, serve, engines))
