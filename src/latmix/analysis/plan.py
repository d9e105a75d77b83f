"""What a model will weigh, where it fits and what quantizing it here will need: from `config.json`, no weights read.

Sizes are counted: a model without storage (PyTorch's meta device) gives every tensor's shape, the recipe says which of
them are packed and which biases appear, and the result is laid out as the checkpoint file will be, header included.
Memory and time: `latmix.analysis.work`. Given up: activations' memory while serving, which depends on the engine.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from latmix import recipes
from latmix.analysis.work import Sizes, Work, work
from latmix.archs import Arch
from latmix.errors import DamagedError
from latmix.model.parts import layers, linear
from latmix.model.source import read_arch
from latmix.numerics import FORMATS, BlockFormat, parse_format
from latmix.recipe import Recipe
from latmix.targets import expected_biases

KEPT = 2  # bytes: bfloat16 on disk and in the cache


@dataclass(frozen=True)
class Checkpoint:
    """Sizes of the model at one format. `disk` and `device`: bytes of the file and of its tensors."""

    format: str
    disk: int
    device: int


@dataclass(frozen=True)
class Plan:
    """`parameters` with the head counted once where it is tied; `cache_per_token`: bytes of keys and values."""

    parameters: int
    quantized: int
    longest: int
    cache_per_token: int
    checkpoints: tuple[Checkpoint, ...]
    work: Work

    def longest_context(self, checkpoint: Checkpoint, device_bytes: float) -> int:
        """Tokens whose keys and values fit beside the weights; 0 where not even the weights fit."""
        return max(0, min(self.longest, int((device_bytes - checkpoint.device) // self.cache_per_token)))


def plan(model: Path | str, recipe: Recipe | str = recipes.DEFAULT, formats: tuple[str, ...] = ()) -> Plan:
    """Formats: those of `latmix list formats` unless given.

    Raises: LatmixError: no or broken config, unknown architecture, recipe or format.
    """
    path, recipe = Path(model), recipes.find(recipe)
    arch = read_arch(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise DamagedError(f"'{path / 'config.json'}' makes no model: {error}") from error
    chosen = [parse_format(text) for text in formats or FORMATS.names()]
    unquantized = sum(parameter.numel() for parameter in skeleton.parameters()) * KEPT
    sizes = [Checkpoint("bfloat16", unquantized, unquantized)]
    sizes += [_checkpoint(skeleton, arch, recipe, format) for format in chosen]
    widths = Sizes.of(_linears(skeleton, arch).values(), config)
    return Plan(
        parameters=unquantized // KEPT,
        quantized=sum(shape[0] * shape[1] for shape in _linears(skeleton, arch).values()),
        longest=config.max_position_embeddings,
        cache_per_token=widths.cached * KEPT,
        checkpoints=tuple(sizes),
        work=work(widths, recipe),
    )


def _linears(skeleton: nn.Module, arch: Arch) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of every quantized linear, by path."""
    found = {}
    for index, layer in enumerate(layers(skeleton, arch)):
        for name in arch.linears:
            place = linear(layer, name)
            found[f"{arch.layers}.{index}.{name}"] = (place.out_features, place.in_features)
    return found


def _checkpoint(skeleton: nn.Module, arch: Arch, recipe: Recipe, format: BlockFormat) -> Checkpoint:
    """The safetensors file: 8 bytes, a JSON header padded to 8, the tensors."""
    tensors: dict[str, tuple[str, list[int], int]] = {}  # name → dtype, shape, bytes
    linears = _linears(skeleton, arch)
    for name, parameter in skeleton.named_parameters():
        if name.removesuffix(".weight") not in linears:
            tensors[name] = ("BF16", list(parameter.shape), parameter.numel() * KEPT)
    head = skeleton.get_submodule(arch.head)
    assert isinstance(head, nn.Linear)
    tensors[f"{arch.head}.weight"] = ("BF16", list(head.weight.shape), head.weight.numel() * KEPT)
    for path, (rows, columns) in linears.items():
        code_bytes, blocks = math.ceil(columns * format.element.bits / 8), math.ceil(columns / format.block)
        tensors[f"{path}.weight_packed"] = ("U8", [rows, code_bytes], rows * code_bytes)
        tensors[f"{path}.weight_scale"] = ("U8", [rows, blocks], rows * blocks)
        if format.scale_element != "e8m0":
            tensors[f"{path}.weight_global_scale"] = ("F32", [], 4)
    for path, rows in _biases(skeleton, arch, recipe).items():
        tensors[f"{path}.bias"] = ("BF16", [rows], rows * KEPT)
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    length = len(json.dumps(header, separators=(",", ":")))
    return Checkpoint(str(format), end + 8 + math.ceil(length / 8) * 8, end)


def _biases(skeleton: nn.Module, arch: Arch, recipe: Recipe) -> dict[str, int]:
    """Linears that a run of this recipe gives a bias, and its length."""
    names = expected_biases(arch, recipe, frozenset())
    last = f"{arch.layers}.{len(layers(skeleton, arch)) - 1}."
    ends = {site.writers[-1] for site in arch.sites if site.stream} - _tuned(arch, recipe)
    found = {}
    for path, (rows, _) in _linears(skeleton, arch).items():
        name = path.removeprefix(f"{arch.layers}.").partition(".")[2]
        if name in names and (name not in ends or path.startswith(last)):  # a shift within the layers ends there
            found[path] = rows
    if arch.head in names:
        found[arch.head] = linear(skeleton, arch.head).out_features
    return found


def _tuned(arch: Arch, recipe: Recipe) -> set[str]:
    inputs = recipe.tuning.biases if recipe.tuning else ()
    return {reader for name in inputs for reader in arch.input(name).readers}
