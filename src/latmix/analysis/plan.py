"""What a model will weigh, where it fits and what quantizing it here will need: from `config.json`, no weights read.

Sizes are counted: a model without storage (PyTorch's meta device) gives every tensor's shape, the recipe says which of
them are packed and which biases appear, and the result is laid out as the checkpoint file will be, header included.
Memory is a model of what the pipeline holds at once, in units that can be counted (weights, hidden states, logits); its
few constants are stated below. Time is an estimate from one timed matrix product: right in order of magnitude.
Given up: activations' memory while serving, which depends on the engine.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from latmix import recipes
from latmix.archs import Arch
from latmix.errors import DamagedError
from latmix.eval.heldout import LOGITS
from latmix.model.parts import layers, linear
from latmix.model.source import read_arch
from latmix.model.tensors import PIECE
from latmix.numerics import FORMATS, BlockFormat, parse_format
from latmix.recipe import Recipe
from latmix.targets import expected_biases

KEPT, FULL = 2, 4  # bytes: bfloat16 on disk and in the cache, float32 while quantizing
LEARN_LOGITS, MEASURE_LOGITS = 8, 5  # tensors of the size of the logits that live at once
LAYER_WIDTHS, LAYER_FFN = (
    8,
    3,
)  # alive at once in a layer's forward, per token: vectors of hidden, of feed-forward width
ROUND = 7  # float32 copies of a linear that live while it is folded or rounded
LEARN_WIDTHS, LEARN_FFN = 20, 9  # kept for backward per token and layer: vectors of hidden, of feed-forward width
MEASURE_BATCH = 8  # windows in one forward
WARM = 170 * 10**6  # tokenizer, first forward, compiler of the kernels: measured on the demo model, 2026-11-22


@dataclass(frozen=True)
class Checkpoint:
    """Sizes of the model at one format. `disk` and `device`: bytes of the file and of its tensors."""

    format: str
    disk: int
    device: int


@dataclass(frozen=True)
class Work:
    """What a recipe will need here: peak host memory in bytes and seconds, by stage."""

    peak: dict[str, int]
    seconds: dict[str, float]


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
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Plan(
        parameters=unquantized // KEPT,
        quantized=sum(shape[0] * shape[1] for shape in _linears(skeleton, arch).values()),
        longest=config.max_position_embeddings,
        cache_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * width * KEPT,
        checkpoints=tuple(sizes),
        work=_work(skeleton, arch, recipe, config),
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


def _work(skeleton: nn.Module, arch: Arch, recipe: Recipe, config: transformers.PreTrainedConfig) -> Work:
    linears = _linears(skeleton, arch).values()
    packed = sum(rows * columns for rows, columns in linears)
    table = config.vocab_size * config.hidden_size
    everything = FULL * (packed + 2 * table)  # what learns needs the whole model; the head is untied
    moved = FULL * (packed + (2 * table if recipe.folded else 0))
    window = min(recipe.calibration.window, config.max_position_embeddings)
    tokens, base = recipe.calibration.windows * window, resident() + WARM
    per_token = config.num_hidden_layers * (LEARN_WIDTHS * config.hidden_size + LEARN_FFN * config.intermediate_size)
    widest = max(columns for _, columns in linears)
    largest = max(rows * columns for rows, columns in linears)
    layer = FULL * packed // config.num_hidden_layers
    batch = MEASURE_BATCH * window * FULL * (LAYER_WIDTHS * config.hidden_size + LAYER_FFN * config.intermediate_size)
    hessians = 40 * widest**2 if recipe.quantizer.startswith("gptq") else 0  # H, its factor and order, mostly float64
    logits = min(LOGITS, MEASURE_BATCH * window * config.vocab_size) * FULL
    peak = {
        "quantize": base + layer + max(ROUND * FULL * largest, hessians) + (batch if hessians else 0),
        "measure": base + max(layer + batch, FULL * min(table, PIECE) + MEASURE_LOGITS * logits),
    }
    rate = _flops()
    seconds = {"quantize": 2 * packed * tokens * (1 + len(arch.inputs) / 2) / rate if hessians else 0.0}
    # beside the two models: maps and what is made of the linears under them; or the unrounded weights, latents with
    # gradient, Adam's moments and three limits, and what their rounding keeps for it
    tuned = 10 * FULL * packed if recipe.tuning and recipe.tuning.codes else FULL * packed
    for name, stage, beside in (("learn", recipe.learning, 2 * moved), ("tune", recipe.tuning, tuned)):
        if stage is not None:
            batch = math.ceil(stage.batch / stage.accumulation) * window
            kept = 0 if stage.checkpointing else batch * per_token  # fused attention keeps no matrix of scores
            peak[name] = base + everything + moved + beside + FULL * (kept + LEARN_LOGITS * batch * config.vocab_size)
            seen = stage.steps * stage.batch * window
            seconds[name] = 8 * (packed + table) * seen / rate * 2  # teacher 2, student 6 a weight; rounding as much
    return Work(peak, seconds)


def resident() -> int:
    """Bytes this process holds now: what Python and its packages take before any work."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 500 * 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _flops() -> float:
    """Multiply-adds times two a second, in float32, on the device that would do the work."""
    a = torch.randn(1024, 1024, device="cuda" if torch.cuda.is_available() else "cpu")
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best
