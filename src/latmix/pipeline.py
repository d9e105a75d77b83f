"""The order of the stages and the resume rule, nothing else: learn, convert layer by layer, tune, describe.

A stage is done when its result has its name in the workspace; a call that finds it there goes on with the next one.
"""

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from latmix import recipes, targets
from latmix.archs import Arch
from latmix.assets import CALIBRATION
from latmix.convert import Conversion, Task, fit_maps
from latmix.data import calibration_windows, read_text, windows
from latmix.distill import Step, learn, ranks, tune
from latmix.errors import InputError
from latmix.eval import Estimate, Scores, score, size_of
from latmix.layerwise import learn_layers
from latmix.model import checkpoint
from latmix.model.attach import attach
from latmix.model.fold import absorb_gains, folded_weights
from latmix.model.inputs import quantize_inputs
from latmix.model.layout import layout_of
from latmix.model.load import Loaded, load, load_tokenizer
from latmix.model.maps import Maps, build_maps, reports
from latmix.model.parts import linears
from latmix.model.source import open_source, pick_device
from latmix.model.tensors import Tensors
from latmix.numerics import Quantized, kernels, parse_format
from latmix.progress import Logged, Progress
from latmix.recipe import Recipe, override
from latmix.rundir import (
    LOG,
    METRICS,
    RECIPE,
    SUMMARY,
    TRANSFORMS,
    TUNING,
    digest,
    is_run,
    partial_of,
    read_json,
    write_json,
)
from latmix.stages import Stages
from latmix.weights import parse_quantizer
from latmix.workspace import LEARN, TUNE, Workspace, workspace

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
    recipe: Recipe | str = "latmix-lu",
    calibration: Path | str | None = None,
    seed: int | None = None,
    settings: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Quantize a Hugging Face checkpoint folder into the new run directory `out`, or go on with a run that was stopped.

    Args:
        recipe: a preset's name, a JSON file or a `Recipe`.
        calibration: a text file; the embedded Wikipedia text unless given.
        seed: replaces the recipe's.
        settings: dotted recipe keys to replace, values as text (`{"learning.steps": "50"}`).

    Where the recipe names a target, what that cannot express is left out, and the run holds the recipe as changed.
    A run that was stopped, however, ends in the same bytes as one that was not; what may differ in the call that goes
    on with it is in `latmix.workspace.MAY_CHANGE`. Of the processes of `torchrun`, all learn together (`distill.ranks`)
    and the first does everything else; for the others this call ends the program.

    Raises: LatmixError: bad input, in one sentence, and nothing is left behind; or a failure in the middle, and what is
        finished is kept for the next call.
    """
    partial_of(out := Path(out))
    helper = ranks.started() > 0
    recipe = override(recipes.find(recipe), settings or {})
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    quantizer = parse_quantizer(recipe.quantizer)
    source = open_source(model)
    tokenizer = load_tokenizer(source.path)
    corpus = read_text(calibration or CALIBRATION, recipe.calibration.separator)
    taught, held_out = calibration_windows(corpus, tokenizer, recipe.calibration, source.longest)
    recipe = targets.fit(recipe, layout_of(source.skeleton(), source.arch, recipe))
    weights, activations = parse_format(recipe.weights), parse_format(recipe.activations)
    maps = _maps(source.arch, source.config, recipe)
    task = Task(source, maps, weights, activations, quantizer, taught, held_out)
    if helper:
        _help(task, recipe, Workspace(partial_of(out)))
        raise SystemExit(0)
    inputs = {"model": source.digest(), "calibration": corpus.digest, "device": pick_device().type, **_versions()}
    with workspace(out, recipe, inputs) as space:
        if not (space.folder / SUMMARY).exists():
            stages = Stages(space.work / "stages.json")
            told = Logged(progress or Progress(), space.folder / LOG)
            found = _convert(task, tokenizer, recipe, space, stages, told)
            summary = {
                "recipe": recipe.digest,
                **found,
                "model": str(model),
                "calibration": {"text": corpus.source, "sha256": corpus.digest, "shape": list(taught.shape)},
                "versions": _versions() | _machine(),
            }
            write_json(space.folder / SUMMARY, summary)
    return Run(out, recipe, read_json(out / SUMMARY))


def _convert(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    space: Workspace,
    stages: Stages,
    progress: Progress,
) -> dict[str, Any]:
    """The stages in order, each skipped where its result is there; returns what they found."""
    folder, maps = space.folder, task.maps
    with stages.stage("learn"):
        before = _learned(task, recipe, space, progress, space.snapshot(LEARN))
    stages.save()
    conditions = reports(maps)
    shards = folder if recipe.tuning is None else space.work
    conversion = Conversion(task, shards, space.work, stages)
    conversion.run(progress)
    with stages.stage("measure"):
        measured = conversion.measured()
    scores = measured and measured.scores
    if recipe.tuning is not None:
        with stages.stage("tune"):
            scores = _tuned(task, recipe, space, progress)
    with stages.stage("save"):
        model = task.source.skeleton()
        checkpoint.describe(model, tokenizer, folder)
        files = {path.name: _entry(path) for path in sorted(folder.glob(checkpoint.EVERY))}
        count = _quantized_weights(model, task.source.arch)
    change = measured and measured.float_change
    return {
        "held_out": scores and dataclasses.asdict(scores),
        "size": dataclasses.asdict(size_of(folder, count)),
        "float_change_kl": {"before": change if before is None else before, "after": change},
        "maps": conditions,
        **conversion.notes(),
        "files": {**files, TRANSFORMS: _entry(folder / TRANSFORMS)},
        "stages": stages.costs,
        "kernels": kernels.status(),
    }


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
        raise InputError(f"A window of {window} tokens does not fit this model; choose from 2 to {loaded.longest}.")
    cut = windows(corpus, loaded.tokenizer, window or min(LONGEST_WINDOW, loaded.longest))
    if original and original.model.config.vocab_size != loaded.model.config.vocab_size:
        raise InputError(f"The reference '{reference}' has another vocabulary than '{target}'.")
    scores = score(loaded.model, cut, original.model if original else None)
    size = size_of(target, _quantized_weights(loaded.model, loaded.arch))
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
    maps = _maps(loaded.arch, loaded.model.config, recipe)
    maps.restore(path / TRANSFORMS)
    quantize_inputs(loaded.model, loaded.arch, maps, activations if rounded else None)
    return loaded


def _maps(arch: Arch, config: PreTrainedConfig, recipe: Recipe) -> Maps:
    block = (parse_format(recipe.activations) or parse_format(recipe.weights)).block
    return build_maps(arch, config, recipe.folded, recipe.online, block=block, seed=recipe.seed).to(pick_device())


def _help(task: Task, recipe: Recipe, space: Workspace) -> None:
    """Learn along with the process that makes the run, in a folder of one's own."""
    if recipe.learning is not None and task.maps.learned() and not (space.folder / TRANSFORMS).exists():
        with tempfile.TemporaryDirectory() as own:
            _learned(task, recipe, Workspace(Path(own)), Progress(), space.snapshot(LEARN))


def _learned(task: Task, recipe: Recipe, space: Workspace, progress: Progress, snapshot: Path) -> float | None:
    """Fit and learn the maps, in place; returns what they cost in float before, None where nothing learns."""
    maps, file, noted = task.maps, space.folder / TRANSFORMS, space.work / "before.json"
    if file.exists():
        maps.restore(file)
    else:
        torch.manual_seed(recipe.seed)
        fit_maps(task.source, maps, task.taught, space.work, progress)
        if recipe.layerwise is not None or (recipe.learning is not None and maps.learned()):
            with ranks.together():
                _learn(task, recipe, space, progress, noted, snapshot)
        maps.save(file)
    return read_json(noted) if noted.exists() else None


def _learn(task: Task, recipe: Recipe, space: Workspace, progress: Progress, noted: Path, snapshot: Path) -> None:
    """Learning couples all layers: the whole model is in memory, and gone afterwards."""
    teacher = load(task.source.path).model
    arch, maps = task.source.arch, task.maps
    absorb_gains(teacher, arch)
    taught_by = recipe.learning or recipe.layerwise
    in_loop = task.weights if taught_by and taught_by.weights else None
    attached = attach(checkpoint.share(teacher), arch, maps, task.activations, in_loop)
    with attached.unquantized():
        change = score(attached.model, task.held_out, teacher).kl
    assert change is not None
    write_json(noted, change.mean)
    learn_layers(attached, teacher, task.taught, recipe, progress)
    if recipe.learning is not None and maps.learned():
        with _curve(space.folder / METRICS, "learn", recipe.learning.steps, progress) as record:
            learn(attached, teacher, task.taught, task.held_out, recipe.learning, recipe.seed, record, snapshot)


def _tuned(task: Task, recipe: Recipe, space: Workspace, progress: Progress) -> Scores:
    """Tune the quantized model of `work` as a whole, write it to the run's folder, and measure it."""
    source, arch = task.source, task.source.arch
    teacher = load(source.path).model
    absorb_gains(teacher, arch)
    if not (space.folder / checkpoint.HEAD).exists():
        student, quantized = _quantized(task, space.work)
        unrounded = folded_weights(teacher, arch, task.maps)
        assert recipe.tuning is not None
        with _curve(space.folder / TUNING, "tune", recipe.tuning.steps, progress) as record:
            arguments = (teacher, task.taught, task.held_out, recipe.tuning, recipe.seed, record, space.snapshot(TUNE))
            quantized = tune(student, arch, quantized, unrounded, *arguments)
        checkpoint.save(student, arch, quantized, space.folder)
    student, _ = _quantized(task, space.folder)
    return score(student, task.held_out, teacher)


def _quantized(task: Task, shards: Path) -> tuple[PreTrainedModel, dict[str, Quantized]]:
    """The whole quantized model that stands in these files, its inputs rounded, and its codes."""
    source, model = task.source, task.source.skeleton()
    tensors = Tensors.of(sorted(shards.glob(checkpoint.EVERY)))
    quantized = checkpoint.assemble(model, source.arch, tensors, task.weights)
    quantize_inputs(model, source.arch, task.maps, task.activations)
    return model, quantized


def _quantized_weights(model: PreTrainedModel, arch: Arch) -> int:
    return sum(place.weight.numel() for place in linears(model, arch).values())


def _entry(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


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


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("latmix", "torch", "transformers")}


def _machine() -> dict[str, str | int | None]:
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
