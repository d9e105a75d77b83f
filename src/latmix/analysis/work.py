"""What quantizing a model will need here, in memory and time: counted from what each stage holds and multiplies.

Folding, rounding and measuring hold one layer at a time, whatever the size of the model, and some tokens in it;
learning and tuning hold all of it. Counts are exact where they can be (weights, Hessians, logits); how many vectors a
forward keeps alive is a constant each, checked by runs of several sizes (benchmarks/plan.py).
Time is an estimate from one timed matrix product, for a machine that has nothing else to do: the linears' products are
counted, and what comes with them taken for a constant factor, so small models take longer than it says
(docs/results/plan.md). Given up: the memory of a GPU, where other things stand.
"""

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from latmix.distill.generate import BATCH as GENERATED
from latmix.eval.heldout import LOGITS
from latmix.model.calibrate import BATCH
from latmix.model.free import numbers_held
from latmix.model.tensors import PIECE
from latmix.recipe import Distillation, Layerwise, Recipe, Tuning
from latmix.registry import parse_spec
from latmix.weights import parse_quantizer

KEPT, FULL = 2, 4  # bytes: bfloat16 on disk, float32 at work
WARM = 130 * 2**20  # tokenizer, text, kernels, first forward: measured on the demo model
WIDTHS, FFN = 8, 3  # alive at once in a layer's forward, per token: vectors of hidden, of feed-forward width
LEARN, TUNE = (13, 6), (20, 9)  # the same where they are kept for backward; weights that learn keep their inputs too
LAYER = (40, 20)  # the same in a layer that learns a map at every input
SCORED, LEARNED = (
    6.5,
    {"kl": 8, "cross-entropy": 4},
)  # tensors of the size of the logits at once: measured, learned from
SLOWER, START = 2, 6.0  # rounding, attention and small operations take as long as the products; seconds of imports
HESSIAN = 12  # bytes for each of its numbers: H in float32, its factor, or H while it is added up, in float64
AIMED = 12  # the same of a cross moment: C in float32, a second matrix in float64 (not measured)
ROUNDED = 7  # float32 copies of a linear while it is folded or rounded


@dataclass(frozen=True)
class Work:
    """What a recipe will need here: peak host memory in bytes and seconds, by stage."""

    peak: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Sizes:
    """Of a model: parameters of all quantized linears, of the largest one, and of one of the two tables; widths; what a
    token leaves in keys and values."""

    linears: int
    largest: int
    widest: int
    table: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    longest: int
    cached: int

    @staticmethod
    def of(linears: Collection[tuple[int, int]], config: transformers.PreTrainedConfig) -> "Sizes":
        """linears: (out, in) of every quantized one."""
        products = [rows * columns for rows, columns in linears]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Sizes(
            sum(products),
            max(products),
            max(columns for _, columns in linears),
            config.vocab_size * config.hidden_size,
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.max_position_embeddings,
            2 * config.num_hidden_layers * config.num_key_value_heads * width,
        )


def work(sizes: Sizes, recipe: Recipe) -> Work:
    """By stage; the largest peak is the run's, the sum of the seconds its time."""
    peak, seconds = _conversion(sizes, recipe)
    for name, stage in (("learn", recipe.learning), ("tune", recipe.tuning)):
        if stage is not None:
            peak[name], seconds[name] = _whole(sizes, recipe, stage)
    if recipe.layerwise is not None:
        peak["learn"], seconds["learn"] = _layerwise(sizes, recipe, recipe.layerwise)
    base, rate = resident() + WARM, _flops() / SLOWER
    times = {k: v / rate for k, v in seconds.items()}
    return Work({k: base + v for k, v in peak.items()}, {"start": START, **times})


def _conversion(s: Sizes, recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes beyond what Python takes, and multiply-adds times two, of the stages that hold one layer."""
    window, quantizer = min(recipe.calibration.window, s.longest), parse_quantizer(recipe.quantizer)
    calibrated, aims = quantizer.needs_hessian, quantizer.needs_cross
    fits = any(parse_spec(spec)[0] == "wush" for spec in recipe.online.values())
    tokens, seen = recipe.calibration.windows * window, recipe.calibration.held_out * window
    batch = min(BATCH, recipe.calibration.windows) * window * FULL * (WIDTHS * s.hidden + FFN * s.intermediate)
    layer = (FULL + 1 + FULL * aims) * s.linears // s.layers  # float32, a byte for every code, perhaps the original
    rounding = max(ROUNDED * FULL * s.largest, (HESSIAN + AIMED * aims) * s.widest**2 if calibrated else 0)
    scored = min(BATCH, recipe.calibration.held_out) * window  # tokens whose logits live at once
    piece, logits = min(s.table, PIECE), FULL * min(LOGITS, scored * s.vocabulary)
    left = (batch + 4 * FULL * s.widest**2) if fits else 0  # a heap keeps what fitting took
    heads = FULL * piece + 2 * KEPT * s.table  # one at work; two in mapped files
    peak = {
        "quantize": left + layer + batch + rounding,
        "measure": left + batch + heads + int(SCORED * logits),
    }
    hessians = (1 + aims) * s.linears * (2 * tokens + 3 * s.widest) if calibrated else 0
    forwards = (
        2 * s.linears * (3 * tokens * (calibrated + aims) + 3 * seen)
    )  # an input at a time comes to three whole ones
    return peak, {"quantize": hessians + forwards, "measure": 2 * 3 * s.table * seen}


def _whole(s: Sizes, recipe: Recipe, stage: Distillation) -> tuple[int, int]:
    """The same for a stage that holds the whole model: what is there of the teacher, and of the student alone."""
    window = min(recipe.calibration.window, s.longest)
    batch = math.ceil(stage.batch / stage.accumulation) * window
    widths, ffn = TUNE if isinstance(stage, Tuning) else LEARN
    kept = 0 if stage.checkpointing else batch * s.layers * (widths * s.hidden + ffn * s.intermediate)
    text = recipe.calibration
    answers = (min(text.windows + text.generated, stage.steps * stage.batch) + text.held_out) * window * s.hidden
    # what is made of the linears and the head under the maps, of the embedding in the rows at hand
    moved = 3 if recipe.learning is not None and recipe.learning.weights else 2  # rounded too, or not
    own = moved * s.linears + (s.table if recipe.folded else 0)
    teacher, gradients = s.linears + 2 * s.table, 0  # maps are small
    first = teacher  # what is there before a step is taken
    if isinstance(stage, Tuning):
        teacher = s.table  # asked and gone, but for its head
        own, gradients = _tuned(s, stage)
        first = teacher + own  # all of the teacher, but no moments of Adam's
    forward = kept + LEARNED[stage.objective] * batch * s.vocabulary  # gone before the last gradients are there
    # by the first stage, once
    generated = text.generated if stage is (recipe.learning or recipe.tuning) else 0
    writing = GENERATED * (window * s.cached + s.vocabulary) if generated else 0
    values = max(first + writing, teacher + own + answers + max(forward, gradients))
    # teacher 2, student 6 a weight and token; rounding as much
    seen = stage.steps * stage.batch * window
    return FULL * values, 2 * (s.linears + s.table) * (8 * seen + generated * window)


def _layerwise(s: Sizes, recipe: Recipe, stage: Layerwise) -> tuple[int, int]:
    """The same where layers learn one after the other, each from what enters and leaves the teacher's."""
    window = min(recipe.calibration.window, s.longest)
    seen, batch = recipe.calibration.windows * window, stage.batch * window
    scored = SCORED * min(BATCH, recipe.calibration.held_out) * window * s.vocabulary  # what the maps cost, before
    layer = 3 * s.linears // s.layers + batch * (LAYER[0] * s.hidden + LAYER[1] * s.intermediate)
    values = s.linears + 2 * s.table + max(int(scored), 3 * seen * s.hidden + layer)
    return FULL * values, 2 * 8 * s.linears * stage.epochs * seen


def _tuned(s: Sizes, tuning: Tuning) -> tuple[int, int]:
    """Numbers of the student but for the gradients; and those."""
    linears, tables = numbers_held(tuning)
    learning = sum(part in tuning.kept for part in ("embedding", "head"))
    gradients = tuning.codes * s.linears + learning * s.table
    return int(linears * s.linears + 2 * tables * s.table) - gradients, gradients


def resident() -> int:
    """Bytes this process holds now: what Python and its packages take before any work."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 500 * 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _flops() -> float:
    """Multiply-adds times two a second, in float32, on the device that would do the work. Processor time, on a CPU, so
    that other processes do not count."""
    cuda = torch.cuda.is_available()
    a = torch.randn(1024, 1024, device="cuda" if cuda else "cpu")
    clock, threads = (time.perf_counter, 1) if cuda else (time.process_time, torch.get_num_threads())
    best = math.inf
    for _ in range(3):
        began = clock()
        float((a @ a)[0, 0])
        best = min(best, (clock() - began) / threads)
    return 2 * 1024**3 / best
