"""The two stages that need the whole model in memory, because their loss couples all layers: learning and tuning.

Each keeps a snapshot in the workspace and goes on from it; its result is a file of the run. Then the model is gone.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from latmix.convert import Task
from latmix.distill import Step, learn, ranks, tune
from latmix.eval import Scores, score
from latmix.layerwise import learn_layers
from latmix.model import checkpoint
from latmix.model.attach import attach
from latmix.model.fit import fit_maps
from latmix.model.fold import absorb_gains, folded_weights
from latmix.model.inputs import quantize_inputs
from latmix.model.load import load
from latmix.model.tensors import Tensors
from latmix.numerics import Quantized
from latmix.progress import Progress
from latmix.recipe import Recipe
from latmix.rundir import METRICS, TRANSFORMS, TUNING, read_json, write_json, written
from latmix.workspace import LEARN, TUNE, Workspace


def help_learning(task: Task, recipe: Recipe, space: Workspace) -> None:
    """Learn along with the process that makes the run, in a folder of one's own."""
    if recipe.learning is not None and task.maps.learned() and not (space.folder / TRANSFORMS).exists():
        with tempfile.TemporaryDirectory() as own:
            learned(task, recipe, Workspace(Path(own)), Progress(), space.snapshot(LEARN))


def learned(task: Task, recipe: Recipe, space: Workspace, progress: Progress, snapshot: Path) -> float | None:
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
        with _curve(space, METRICS, "learn", recipe.learning.steps, progress) as record:
            learn(attached, teacher, task.taught, task.held_out, recipe.learning, recipe.seed, record, snapshot)


def tuned(task: Task, recipe: Recipe, space: Workspace, progress: Progress) -> Scores:
    """Tune the quantized model of `work` as a whole, write it to the run's folder, and measure it."""
    source, arch = task.source, task.source.arch
    teacher = load(source.path).model
    absorb_gains(teacher, arch)
    if not (space.folder / checkpoint.HEAD).exists():
        student, quantized = _quantized(task, space.work)
        unrounded = folded_weights(teacher, arch, task.maps)
        assert recipe.tuning is not None
        with _curve(space, TUNING, "tune", recipe.tuning.steps, progress) as record:
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


@contextmanager
def _curve(space: Workspace, name: str, stage: str, steps: int, progress: Progress) -> Iterator[Callable[[Step], None]]:
    """Where a learning stage reports its steps: the progress, and a line each in a file that grows in `work` and is the
    run's when it is whole. A stage that goes on writes it again, from its snapshot."""
    progress.stage(stage, steps)
    growing = space.work / name
    with growing.open("w", encoding="utf-8") as metrics:

        def record(step: Step) -> None:
            metrics.write(json.dumps(dataclasses.asdict(step)) + "\n")
            if step.step:
                progress.advance("" if step.held_out is None else f"held-out KL {step.held_out:.4f}")

        yield record
    with written(space.folder / name) as temporary:
        shutil.copyfile(growing, temporary)
