"""The order of the stages and the resume rule, nothing else: learn, convert layer by layer, tune, describe.

A stage is done when its result has its name in the workspace; a call that finds it there goes on with the next one.
"""

import dataclasses
import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from latmix import compiled, ranks, recipes, targets
from latmix.archs import Arch
from latmix.assets import CALIBRATION
from latmix.convert import Conversion, Task
from latmix.data import Corpus, calibration_windows, read_text
from latmix.eval import size_of
from latmix.model import checkpoint
from latmix.model.inputs import quantize_inputs
from latmix.model.layout import layout_of
from latmix.model.load import Loaded, load_tokenizer
from latmix.model.maps import Maps, build_maps, reports
from latmix.model.parts import linears
from latmix.model.source import open_source, pick_device
from latmix.numerics import parse_format
from latmix.progress import Logged, Progress
from latmix.recipe import Recipe, override
from latmix.rundir import (
    LOG,
    RECIPE,
    SUMMARY,
    TRANSFORMS,
    partial_of,
    read_json,
    write_json,
)
from latmix.stages import Stages
from latmix.weights import parse_quantizer
from latmix.whole import learned, tuned
from latmix.workspace import Workspace, workspace


@dataclass(frozen=True)
class Run:
    """A finished run directory; `summary` is its `summary.json`."""

    path: Path
    recipe: Recipe
    summary: dict[str, Any]


@ranks.together()
def quantize(
    model: Path | str,
    out: Path | str,
    recipe: Recipe | str = recipes.DEFAULT,
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
    on with it is in `latmix.workspace.MAY_CHANGE`. The processes of `torchrun` work together (`latmix.ranks`): the
    first returns the run, for the others this call ends the program.

    Raises:
        LatmixError: bad input, in one sentence, and nothing is left behind; or a failure in the middle, and what is
            finished is kept for the next call.
    """
    partial_of(out := Path(out))
    recipe = override(recipes.find(recipe), settings or {})
    recipe = recipe if seed is None else dataclasses.replace(recipe, seed=seed)
    quantizer = parse_quantizer(recipe.quantizer)
    source = open_source(model)
    tokenizer = load_tokenizer(source.path)
    corpus = read_text(calibration or CALIBRATION, recipe.calibration.separator)
    taught, held_out = calibration_windows(corpus, tokenizer, recipe.calibration, source.longest, source.vocabulary)
    recipe = targets.fit(recipe, layout_of(source.skeleton(), source.arch, recipe))
    weights, activations = parse_format(recipe.weights), parse_format(recipe.activations)
    maps = _maps(source.arch, source.config, recipe)
    task = Task(source, maps, weights, activations, quantizer, taught, held_out)
    if not ranks.first():
        space = Workspace(partial_of(out))
        if not ranks.agreed(None):
            _convert(task, tokenizer, recipe, space, Stages(), Progress())
        raise SystemExit(0)
    told = Logged(progress or Progress(), partial_of(out) / LOG)
    with workspace(out, recipe, partial(_inputs, task, corpus, told), told) as space:
        if not ranks.agreed((space.folder / SUMMARY).exists()):
            stages = Stages(space.work / "stages.json")
            found = _convert(task, tokenizer, recipe, space, stages, told)
            summary = {
                "recipe": recipe.digest,
                **found,
                "model": str(model),
                "calibration": {"text": corpus.source, "sha256": corpus.digest, "shape": list(taught.shape)},
                "versions": versions() | _machine(),
            }
            write_json(space.folder / SUMMARY, summary)
    return Run(out, recipe, read_json(out / SUMMARY))


def _inputs(task: Task, corpus: Corpus, progress: Progress) -> dict[str, str]:
    """What a run is made from, by content. The windows too: another tokenizer makes others."""
    windows = torch.cat([task.taught, task.held_out]).numpy().tobytes()
    return {
        "model": task.source.digest(progress),
        "calibration": corpus.digest,
        "tokens": hashlib.sha256(windows).hexdigest(),
        "device": pick_device().type,
        **versions(),
    }


def _convert(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    space: Workspace,
    stages: Stages,
    progress: Progress,
) -> dict[str, Any]:
    """The stages in order, each skipped where its result is there; returns what they found, on the first rank."""
    folder, maps = space.folder, task.maps
    with stages.stage("learn"):
        before = learned(task, recipe, space, progress)
    stages.save()
    conditions = reports(maps)
    shards = folder if recipe.tuning is None else space.work
    conversion = Conversion(task, shards, space.work, stages)
    conversion.run(progress)
    with stages.stage("measure"):
        measured = conversion.measured(progress) if ranks.first() else None
    scores = measured and measured.scores
    if recipe.tuning is not None:
        with stages.stage("tune"):
            scores = tuned(task, recipe, space, progress)
    if not ranks.first():
        return {}
    with stages.stage("save"):
        model = task.source.skeleton()
        checkpoint.describe(model, tokenizer, folder, space.work)
        count = quantized_weights(model, task.source.arch)
    change = measured and measured.float_change
    return {
        "held_out": scores and dataclasses.asdict(scores),
        "size": dataclasses.asdict(size_of(folder, count)),
        "float_change_kl": {"before": change if before is None else before, "after": change},
        "maps": conditions,
        **conversion.notes(),
        "stages": stages.costs,
        "kernels": compiled.status(),
    }


def restore(path: Path, rounded: bool = True, progress: Progress | None = None) -> Loaded:
    """The model of a run, weights decoded, activations quantized as in the run, or with `rounded=False` left alone.

    Raises: LatmixError: the run is damaged.
    """
    tensors = checkpoint.checked(path, progress)
    recipe = recipes.find(str(path / RECIPE))
    activations = parse_format(recipe.activations)
    loaded = checkpoint.restore(path, tensors, parse_format(recipe.weights), progress or Progress())
    maps = _maps(loaded.arch, loaded.model.config, recipe)
    maps.restore(path / TRANSFORMS)
    quantize_inputs(loaded.model, loaded.arch, maps, activations if rounded else None)
    return loaded


def _maps(arch: Arch, config: PreTrainedConfig, recipe: Recipe) -> Maps:
    block = (parse_format(recipe.activations) or parse_format(recipe.weights)).block
    return build_maps(arch, config, recipe.folded, recipe.online, block=block, seed=recipe.seed).to(pick_device())


def quantized_weights(model: PreTrainedModel, arch: Arch) -> int:
    return sum(place.weight.numel() for place in linears(model, arch).values())


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("latmix", "torch", "transformers")}


def _machine() -> dict[str, str | int | None]:
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
