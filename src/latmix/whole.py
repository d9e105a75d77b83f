"""The two stages that need the whole model in memory, because their loss couples all layers: learning and tuning.

Each keeps a snapshot in the workspace and goes on from it; its result is a file of the run. Then the model is gone.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from latmix import ranks, sharding
from latmix.convert import Task
from latmix.distill import Step, Teacher, generated, learn, tune
from latmix.eval import Scores, score
from latmix.layerwise import learn_layers
from latmix.model import checkpoint
from latmix.model.attach import attach
from latmix.model.fit import fit_maps
from latmix.model.fold import absorb_layer, fold_layer
from latmix.model.free import Filled, Free, free, numbers_held
from latmix.model.inputs import quantize_inputs
from latmix.model.parts import layers, linear
from latmix.model.spread import head_of, spread, too_large
from latmix.model.tensors import Tensors
from latmix.progress import Progress
from latmix.recipe import Recipe, Tuning
from latmix.rundir import INPUTS, METRICS, TRANSFORMS, TUNING, read_json, write_json, written
from latmix.transforms import evaluated_once
from latmix.workspace import LEARN, TUNE, Workspace

BEFORE = "before.json"  # what maps cost in float before they learned


def learned(task: Task, recipe: Recipe, space: Workspace, progress: Progress) -> float | None:
    """Fit and learn the maps, in place; returns what they cost in float before, None where nothing learns."""
    maps, file, noted = task.maps, space.folder / TRANSFORMS, space.work / BEFORE
    if not ranks.agreed(file.exists()):
        torch.manual_seed(recipe.seed)
        fit_maps(task.source, maps, task.taught, space.work, progress)
        if recipe.layerwise is not None or (recipe.learning is not None and maps.learned()):
            _learn(task, recipe, space, progress)
        if ranks.first():
            maps.save(file)
        ranks.wait()
    maps.restore(file)  # the first rank's, to the last bit
    return read_json(noted) if noted.exists() else None


def _learn(task: Task, recipe: Recipe, space: Workspace, progress: Progress) -> None:
    """Learning couples all layers: the whole model is in memory, and gone afterwards. The teacher shares its weights;
    where it is in parts, it has its own, and is there while it is needed."""
    model, arch, maps = spread(task.source, progress), task.source.arch, task.maps
    if sharding.is_sharded(model):
        student, teacher = model, _teacher(task, space, progress)
    else:
        student, teacher = checkpoint.share(model), Teacher(lambda: model, linear(model, arch.head), _digest(space))
    taught_by = recipe.learning or recipe.layerwise
    in_loop = task.weights if taught_by and taught_by.weights else None
    attached = attach(student, arch, maps, task.activations, in_loop)
    if not ranks.agreed((space.work / BEFORE).exists()):
        with attached.unquantized():
            change = score(attached.model, task.held_out, teacher.model, progress=progress).kl
        assert change is not None
        if ranks.first():
            write_json(space.work / BEFORE, change.mean)
    if recipe.layerwise is not None:
        learn_layers(attached, teacher.model, task.taught, recipe.layerwise, recipe.seed, progress)
    if recipe.learning is not None and maps.learned():
        with _curve(space, METRICS) as record:
            lessons = _lessons(task, recipe, space, teacher, progress)
            arguments = (recipe.learning, recipe.seed, record, space.snapshot(LEARN), progress)
            learn(attached, teacher, lessons, task.held_out, *arguments)


def tuned(task: Task, recipe: Recipe, space: Workspace, progress: Progress) -> Scores:
    """Tune the quantized model of `work` as a whole, write it to the run's folder, and measure it."""
    source, arch, tuning, share = task.source, task.source.arch, recipe.tuning, 1 / ranks.world()
    assert tuning is not None
    if not ranks.agreed((space.folder / checkpoint.HEAD).exists()):
        student, stored = source.skeleton(), _stored(task, space.work)
        stored.fill_tables(student, arch)
        offload = too_large(source, *(share * numbers for numbers in numbers_held(tuning)))
        parts = free(student, arch, _filling(task, student, stored, tuning), tuning, progress, offload)
        quantize_inputs(student, arch, task.maps, task.activations)
        with _curve(space, TUNING) as record:
            teacher = _teacher(task, space, progress)
            lessons = _lessons(task, recipe, space, teacher, progress)
            arguments = (tuning, recipe.seed, record, space.snapshot(TUNE), progress)
            tune(student, parts, teacher, lessons, task.held_out, *arguments)
        _write(task, student, parts, stored, space.folder, progress)
        del student, parts
    model, shard = source.skeleton(), partial(sharding.shard, offload=too_large(source, 2 * share, 2 * share))
    checkpoint.assemble(model, arch, _stored(task, space.folder), progress, shard)
    sharding.join_layers(model.base_model)
    quantize_inputs(model, arch, task.maps, task.activations)
    return score(model, task.held_out, spread(source, progress), progress=progress)


def _lessons(
    task: Task, recipe: Recipe, space: Workspace, teacher: Teacher, progress: Progress
) -> Int[Tensor, "learn window"]:
    """The windows that are learned from end to end: the same for both stages."""
    stage, count = recipe.learning or recipe.tuning, recipe.calibration.generated
    assert stage is not None
    more = generated(teacher, task.taught, count, recipe.seed, stage.compute, space.work, progress)
    return torch.cat([task.taught, more])


def _teacher(task: Task, space: Workspace, progress: Progress) -> Teacher:
    """A model of its own."""
    return Teacher(partial(spread, task.source, progress), head_of(task.source), _digest(space))


def _digest(space: Workspace) -> str:
    """Of the original."""
    return str(read_json(space.folder / INPUTS)["model"])


def _stored(task: Task, shards: Path) -> checkpoint.Stored:
    return checkpoint.Stored.of(Tensors.of(sorted(shards.glob(checkpoint.EVERY))), task.weights)


def _filling(
    task: Task, student: PreTrainedModel, stored: checkpoint.Stored, tuning: Tuning
) -> Callable[[int], Filled]:
    """Puts a layer of the quantized model into the student; what it was rounded from, if that is asked, is folded anew
    from the original."""
    source, arch, wide = task.source, task.source.arch, copy.deepcopy(task.maps).double()
    students, originals = layers(student, arch), layers(source.skeleton(), arch)

    @torch.no_grad()
    def fill(index: int) -> Filled:
        path, original = f"{arch.layers}.{index}", originals[index]
        quantized = stored.fill_layer(students[index], arch, path)
        if not tuning.codes:
            return quantized, {}
        heads, last = source.config.num_key_value_heads, index == len(originals) - 1
        with source.filled(original, path), evaluated_once(wide):
            absorb_layer(original, arch)
            fold_layer(original, arch, wide, index, heads=heads, last=last)
            return quantized, {name: linear(original, name).weight for name in arch.linears}

    return fill


def _write(
    task: Task, student: PreTrainedModel, parts: Free, stored: checkpoint.Stored, folder: Path, progress: Progress
) -> None:
    """The tuned model, a layer at a time put together from all ranks; the tables last, the head after all else."""
    arch = task.source.arch
    progress.stage("write", task.source.layers)
    for index, layer in enumerate(layers(student, arch)):
        path = f"{arch.layers}.{index}"
        codes = parts.settled(path)
        plain = {name: tensor for name, tensor in layer.state_dict().items() if "parametrizations" not in name}
        kept = {name: sharding.whole(tensor) for name, tensor in plain.items()}
        if ranks.first():
            rest = [name for name in arch.linears if name not in codes]
            codes |= {name: stored.quantized(f"{path}.{name}", linear(layer, name).in_features) for name in rest}
            checkpoint.write_layer(folder / checkpoint.layer_file(index), path, kept, checkpoint.packed(codes), {})
        progress.advance()
    checkpoint.write_tables(student, arch, folder)
    ranks.wait()


@contextmanager
def _curve(space: Workspace, name: str) -> Iterator[Callable[[Step], None]]:
    """Where a learning stage reports its steps: a line each in a file that grows in `work` and is the run's when it is
    whole. A stage that goes on writes it again, from its snapshot."""
    if not ranks.first():
        yield lambda step: None
        return
    growing = space.work / name
    with growing.open("w", encoding="utf-8") as metrics:
        yield lambda step: print(json.dumps(dataclasses.asdict(step)), file=metrics)
    with written(space.folder / name) as temporary:
        shutil.copyfile(growing, temporary)
