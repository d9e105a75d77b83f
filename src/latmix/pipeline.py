"""The order of the stages, and nothing else: load, learn, fold, quantize the weights, save, measure."""

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from latmix import recipes, targets
from latmix.assets import CALIBRATION
from latmix.data import calibration_windows, read_text, windows
from latmix.distill import Answers, Mapped, Step, learn, mean_divergence, tune
from latmix.errors import LatmixError
from latmix.eval import Estimate, errors_of_run, score, size_of
from latmix.layerwise import learn_layers
from latmix.model import checkpoint
from latmix.model.attach import Attached, attach
from latmix.model.calibrate import quantize_weights
from latmix.model.fit import fit
from latmix.model.fold import absorb_gains, fold
from latmix.model.inputs import quantize_inputs
from latmix.model.layout import layout_of
from latmix.model.load import Loaded, load
from latmix.model.maps import Maps, build_maps, reports
from latmix.model.parts import layers, linear, linears
from latmix.numerics import kernels, parse_format
from latmix.progress import Progress
from latmix.recipe import Recipe, override
from latmix.rundir import METRICS, RECIPE, SUMMARY, TRANSFORMS, TUNING, is_run, new_run, write_json
from latmix.stages import Stages
from latmix.weights import parse_quantizer

LONGEST_WINDOW = 2048  # the field's window for perplexity, where the model can take it


@dataclass(frozen=True)
class Run:
    """A finished run directory; `summary` is its `summary.json`."""

    path: Path
    recipe: Recipe
    summary: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """`kl` and `top1_agreement` are None without a reference, `bits_per_weight` for an unquantized model."""

    perplexity: Estimate
    kl: Estimate | None
    top1_agreement: Estimate | None
    size_bytes: int
    bits_per_weight: float | None
    text: str
    windows: int
    window: int


def quantize(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | str = recipes.DEFAULT,
    calibration: Path | str | None = None,
    seed: int | None = None,
    settings: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Quantize a Hugging Face checkpoint folder into the new run directory `out`.

    Args:
        recipe: a preset's name, a JSON file or a `Recipe`.
        calibration: a text file; the embedded Wikipedia text unless given.
        seed: replaces the recipe's.
        settings: dotted recipe keys to replace, values as text (`{"learning.steps": "50"}`).

    Where the recipe names a target, what that cannot express is left out, and the run holds the recipe as changed.

    Raises: LatmixError: bad input, in one sentence; nothing is left behind.
    """
    recipe = override(recipes.find(recipe), settings or {})
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    weights, quantizer = parse_format(recipe.weights), parse_quantizer(recipe.quantizer)
    progress, stages = progress or Progress(), Stages()
    with new_run(Path(out)) as folder:
        with stages.stage("load"):
            corpus = read_text(calibration or CALIBRATION, recipe.calibration.separator)
            loaded = load(model)
            taught, held_out = calibration_windows(corpus, loaded.tokenizer, recipe.calibration, loaded.longest)
            recipe = targets.fit(recipe, layout_of(loaded.model, loaded.arch, recipe))
            absorb_gains(loaded.model, loaded.arch)
        student, maps, float_change = _transform(loaded, taught, held_out, recipe, folder, stages, progress)
        with stages.stage("quantize"):
            progress.stage("quantize", len(layers(student, loaded.arch)))
            unrounded = {p: place.weight for p, place in linears(student, loaded.arch).items()} if recipe.tuning else {}
            quantized = quantize_weights(
                student, loaded.arch, taught, quantizer, weights, lambda layer: progress.advance(f"layer {layer}")
            )
        if recipe.tuning is not None:
            with stages.stage("tune"), _curve(folder / TUNING, "tune", recipe.tuning.steps, progress) as record:
                arguments = (loaded.model, taught, held_out, recipe.tuning, recipe.seed, record)
                quantized = tune(student, loaded.arch, quantized, unrounded, *arguments)
                checkpoint.round_kept(student, loaded.arch)
        with stages.stage("save"):
            checkpoint.save(student, quantized, loaded.tokenizer, folder)
            maps.save(folder / TRANSFORMS)
        with stages.stage("measure"):
            scores = score(student, held_out, loaded.model)
            rounded = parse_format(recipe.activations)
            errors = errors_of_run(loaded, maps, held_out, rounded) if rounded else {}
        size = size_of(folder, sum(q.codes.numel() for q in quantized.values()))
        summary = {
            "recipe": recipe.digest,
            "held_out": dataclasses.asdict(scores),
            "size": dataclasses.asdict(size),
            "float_change_kl": float_change,
            "maps": reports(maps),
            "errors": errors,
            "stages": stages.costs,
            "kernels": kernels.status(),
            "model": str(model),
            "calibration": {"text": corpus.source, "sha256": corpus.digest, "shape": list(taught.shape)},
            "versions": _versions(),
        }
        (folder / RECIPE).write_text(recipe.to_json() + "\n", "utf-8")
        write_json(folder / SUMMARY, summary)
    return Run(Path(out), recipe, summary)


def evaluate(
    target: Path | str,
    text: Path | str,
    reference: Path | str | None = None,
    window: int | None = None,
    separator: str | None = None,
) -> Evaluation:
    """Measure a run, or a plain Hugging Face model, on a text; with `reference`, against that model.

    Args:
        window: tokens in a window; unless given 2048, or the longest the model can take.
        separator: what stands between documents in the text; None: it is one document.

    Raises: LatmixError: bad input, in one sentence.
    """
    target = Path(target)
    corpus = read_text(text, separator)
    loaded = restore(target) if is_run(target) else load(target)
    original = load(reference) if reference is not None else None
    if window is not None and not 2 <= window <= loaded.longest:
        raise LatmixError(f"A window of {window} tokens does not fit this model; choose from 2 to {loaded.longest}.")
    cut = windows(corpus, loaded.tokenizer, window or min(LONGEST_WINDOW, loaded.longest))
    if original and original.model.config.vocab_size != loaded.model.config.vocab_size:
        raise LatmixError(f"The reference '{reference}' has another vocabulary than '{target}'.")
    scores = score(loaded.model, cut, original.model if original else None)
    owners = layers(loaded.model, loaded.arch)
    count = sum(linear(layer, name).weight.numel() for layer in owners for name in loaded.arch.linears)
    size = size_of(target, count)
    return Evaluation(
        scores.perplexity, scores.kl, scores.top1_agreement, size.bytes, size.bits_per_weight, str(text), *cut.shape
    )


def restore(path: Path, rounded: bool = True) -> Loaded:
    """The model of a run, weights decoded, activations quantized as in the run, or with `rounded=False` left alone.

    Raises: LatmixError: the run is damaged.
    """
    recipe = recipes.find(str(path / RECIPE))
    activations = parse_format(recipe.activations)
    loaded = checkpoint.restore(path, parse_format(recipe.weights))
    maps = _maps(loaded, recipe)
    maps.restore(path / TRANSFORMS)
    quantize_inputs(loaded.model, loaded.arch, maps, activations if rounded else None)
    return loaded


def _transform(
    loaded: Loaded,
    taught: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    recipe: Recipe,
    folder: Path,
    stages: Stages,
    progress: Progress,
) -> tuple[PreTrainedModel, Maps, dict[str, float]]:
    """Attach, learn and fold: the model to quantize, its inputs rounded; its maps; what they cost in float."""
    activations, weights = parse_format(recipe.activations), parse_format(recipe.weights)
    torch.manual_seed(recipe.seed)
    student, maps = checkpoint.share(loaded.model), _maps(loaded, recipe)
    taught_by = recipe.learning or recipe.layerwise
    in_loop = weights if taught_by and taught_by.weights else None
    attached = attach(student, loaded.arch, maps, activations, in_loop)
    before = _float_change(loaded.model, attached, held_out)
    with stages.stage("learn"):
        fit(maps, loaded.model, loaded.arch, taught)
        learn_layers(attached, loaded.model, taught, recipe, progress)
        _learn(attached, loaded.model, taught, held_out, recipe, folder, progress)
    after = _float_change(loaded.model, attached, held_out)
    with stages.stage("fold"):
        fold(attached, activations)
        checkpoint.round_kept(student, loaded.arch)
    return student, maps, {"before": before, "after": after}


def _maps(loaded: Loaded, recipe: Recipe) -> Maps:
    block = (parse_format(recipe.activations) or parse_format(recipe.weights)).block
    maps = build_maps(loaded.arch, loaded.model.config, recipe.folded, recipe.online, block=block, seed=recipe.seed)
    return maps.to(loaded.model.device)


def _learn(
    attached: Attached,
    teacher: PreTrainedModel,
    taught: Int[Tensor, "learn window"],
    held_out: Int[Tensor, "held_out window"],
    recipe: Recipe,
    folder: Path,
    progress: Progress,
) -> None:
    if recipe.learning is None or not attached.maps.learned():
        return
    with _curve(folder / METRICS, "learn", recipe.learning.steps, progress) as record:
        learn(attached, teacher, taught, held_out, recipe.learning, recipe.seed, record)


@contextmanager
def _curve(path: Path, stage: str, steps: int, progress: Progress) -> Iterator[Callable[[Step], None]]:
    """Where a learning stage reports its steps: a line each in the file, and the progress."""
    progress.stage(stage, steps)
    with path.open("w", encoding="utf-8") as metrics:

        def record(step: Step) -> None:
            metrics.write(json.dumps(dataclasses.asdict(step)) + "\n")
            if step.step:
                progress.advance("" if step.held_out is None else f"held-out KL {step.held_out:.4f}")

        yield record


def _float_change(reference: PreTrainedModel, attached: Attached, held_out: Int[Tensor, "held_out window"]) -> float:
    """KL of the model under the maps, nothing rounded: what an inexact map costs by itself."""
    with attached.unquantized():
        return mean_divergence(Answers(reference, held_out), Mapped(attached, 0.0), held_out)


def _versions() -> dict[str, str | int | None]:
    packages = {name: version(name) for name in ("latmix", "torch", "transformers")}
    return packages | {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
