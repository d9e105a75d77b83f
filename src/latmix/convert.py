"""From the original's layers to packed ones: one pass over the disk, one layer in memory.

Each layer is read, its norm gains absorbed, folded, checked, its weights quantized to what the quantized layers before
it produce, written, and forgotten; the held-out windows go along and are measured at the end. A layer is done when its
file is there, and what enters the next one is on the disk before that: so a pass that was killed goes on with the layer
it was at. Where nothing is calibrated and nothing measured, no activation is computed, and of a layer no more than some
rows of a linear are there at a time, for each thread: all of them where the map that they go through is dense.

Ranks share out what is computed of a layer: the calibration windows, the linears that read an input, the three ways of
the held-out ones; the first writes it. Where no activation is computed, every layer is one rank's. Given up: sharing
out the folding of a layer that computes, which every rank does.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latmix import ranks
from latmix.archs import Input
from latmix.errors import LatmixError
from latmix.eval.heldout import HeldOut, Measured
from latmix.model import checkpoint
from latmix.model.calibrate import layer_arguments
from latmix.model.checkpoint import EMBEDDING, HEAD, layer_file
from latmix.model.fold import absorb_layer, absorb_rows, fold_layer, fold_norms, folding, reset_gains
from latmix.model.inputs import quantize_layer_inputs
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear
from latmix.model.quantize import quantize_layer, shared_scale
from latmix.model.source import Source, empty
from latmix.model.tables import write_embedding, write_head
from latmix.model.taught import Taught
from latmix.model.tensors import Tensors, metadata
from latmix.numerics import BlockFormat
from latmix.progress import Progress
from latmix.rundir import behind
from latmix.stages import Stages
from latmix.transforms import evaluated_once
from latmix.weights import WeightQuantizer

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """What a run does to every layer. Attributes: held_out: no windows where nothing is to be measured."""

    source: Source
    maps: Maps
    weights: BlockFormat
    activations: BlockFormat | None
    quantizer: WeightQuantizer
    taught: Int[Tensor, "learn window"]
    held_out: Int[Tensor, "held_out window"]


class Conversion:
    """The pass. `shards`: where the quantized files go; `work`: what only the pass needs.

    Cost: one layer in float32 and a few copies of one of its linears in memory; on disk 4 bytes for each hidden value
    of the calibration windows, if the quantizer needs them, and three times that for the held-out ones. A quantizer
    that aims at the original's outputs needs the original layer beside the folded one, and its hidden values.
    """

    def __init__(self, task: Task, shards: Path, work: Path, stages: Stages) -> None:
        self.task, self.shards, self.stages = task, shards, stages
        self.source, self.arch, self.maps = task.source, task.source.arch, task.maps
        self.model, self.wide = task.source.skeleton(), copy.deepcopy(task.maps).double()
        self.layers = layers(self.model, self.arch)
        self.arguments = layer_arguments(self.model, self.arch, task.taught.shape[1])
        self.held_out = HeldOut(self.source, self.maps, task.held_out, work, self.arguments)
        self.taught = Taught(self.source, self.maps, task.taught, task.quantizer, work, self.arguments)

    @torch.no_grad()
    def run(self, progress: Progress) -> None:
        """Do what is not done yet. Raises: LatmixError: bad numbers, a quantizer that failed, a full disk."""
        with evaluated_once(self.maps.shared()), evaluated_once(self.wide.shared()):
            self._tables(progress)
            left = [index for index in range(len(self.layers)) if not (self.shards / layer_file(index)).exists()]
            left = ranks.agreed(left)
            mine = left if self._computes else ranks.mine(left)
            done = len(self.layers) - len(left)
            progress.stage("quantize", done + len(mine), done)
            with behind() as write:
                for index in mine:
                    with evaluated_once(self.maps.of_layer(index)), evaluated_once(self.wide.of_layer(index)):
                        self._layer(index) if self._computes else self._linears(index, write)
                    self.held_out.drop(index)
                    self.taught.drop(index)
                    self.stages.save()
                    progress.advance(f"layer {index}")
            ranks.wait()

    def _tables(self, progress: Progress) -> None:
        """Embedding and head, which do not depend on each other."""
        tables = {EMBEDDING: write_embedding, HEAD: write_head}
        left = ranks.agreed([name for name in tables if not (self.shards / name).exists()])
        progress.stage("embedding and head", len(left))
        for name in ranks.mine(left):
            with self.stages.stage("fold"):
                tables[name](self.source, self.wide, self.shards / name)
            progress.advance("folded")
        ranks.wait()

    def measured(self, progress: Progress) -> Measured | None:
        """None where there are no held-out windows."""
        return self.held_out.measured(self.model, Tensors.of([self.shards / HEAD]), progress)

    def notes(self) -> dict[str, dict[str, Any]]:
        """What the layers' files say of how they came about: errors by place, damping and dead inputs by linear."""
        every: dict[str, dict[str, Any]] = {"errors": {}, "damping": {}, "dead_inputs": {}}
        for index in range(len(self.layers)):
            words = metadata(self.shards / layer_file(index))
            for key, found in every.items():
                found |= json.loads(words.get(key, "{}"))
        return every

    @property
    def _computes(self) -> bool:
        """Whether activations are needed."""
        return self.task.quantizer.needs_hessian or len(self.task.held_out) > 0

    def _layer(self, index: int) -> None:
        task, layer, path, stage = self.task, self.layers[index], f"{self.arch.layers}.{index}", self.stages.stage
        if index == 0:
            self._begin()
        with stage("load"):
            self.source.fill(layer, path)
            absorb_layer(layer, self.arch)
        with stage("measure"):
            errors = self.held_out.original(layer, index, task.activations)
            self.taught.meet(layer)
        with stage("fold"):
            fold_layer(layer, self.arch, self.wide, index, **self._place(index))
        with stage("measure"):
            inputs = quantize_layer_inputs(layer, self.arch, self.maps, index, None)
            self.held_out.folded(layer, index)
            inputs.remove()
        with stage("quantize"):
            checkpoint.round_kept(layer, self.arch.linears)
            inputs = quantize_layer_inputs(layer, self.arch, self.maps, index, task.activations)
            seen = self.taught.moments(layer, index)
            with _named(path):
                found = quantize_layer(layer, self.arch, task.quantizer, task.weights, seen)
            self.taught.advance(layer, index)
        with stage("measure"):
            self.held_out.quantized(layer, index)
            inputs.remove()
            ranks.wait()  # what enters the next layer is on the disk
        for name in found.quantized:
            empty(linear(layer, name), "weight")  # its codes are what is written
        with stage("save"):
            notes = {"errors": errors, "damping": _at(path, found.damping), "dead_inputs": _at(path, found.dead)}
            words = {key: json.dumps(value) for key, value in notes.items() if value}
            if ranks.first():
                stored = checkpoint.packed(found.quantized)
                checkpoint.write_layer(self.shards / layer_file(index), path, layer.state_dict(), stored, words)
        empty(layer)

    def _linears(self, index: int, write: Callable[[Callable[[], None]], None]) -> None:
        """A layer that computes nothing: some rows of a linear in memory for each thread, or the linears that share a
        tensor scale; and the codes of the layer before, while they are written."""
        task, layer, path = self.task, self.layers[index], f"{self.arch.layers}.{index}"
        stored: dict[str, Tensor] = {}
        with self.stages.stage("quantize"):
            self.source.fill(layer, path, left_out=[f"{name}.weight" for name in self.arch.linears])
            for spot in self.arch.inputs:
                packing = {
                    name: checkpoint.Packing(linear(layer, name).weight.shape, task.weights) for name in spot.readers
                }
                if task.weights.scale_element == "e8m0":
                    for name in spot.readers:
                        self._folded(index, spot, name, partial(self._pack, f"{path}.{name}", packing[name], None))
                else:
                    whole = {
                        name: torch.cat(self._folded(index, spot, name, lambda rows, at: rows)) for name in spot.readers
                    }
                    scale = shared_scale(list(whole.values()), task.weights)
                    for name, weight in whole.items():
                        self._pack(f"{path}.{name}", packing[name], scale, weight, 0)
                for name in spot.readers:
                    stored |= packing[name].named(name)
            reset_gains(layer, self.arch)
            fold_norms(layer, self.arch, self.wide, index)
        with self.stages.stage("save"):
            file, kept = self.shards / layer_file(index), layer.state_dict()
            write(lambda: checkpoint.write_layer(file, path, kept, stored, {}))
        empty(layer)

    def _folded(self, index: int, spot: Input, name: str, then: Callable[[Tensor, int], T]) -> list[T]:
        """What `then` makes of the rows of a linear in its bases and of the first one's number, some rows at a time, on
        several threads; afterwards its bias is in its place."""
        layer, place = self.layers[index], linear(self.layers[index], name)
        change = folding(layer, self.arch, self.wide, index, name, **self._place(index))

        def moved(rows: Tensor, at: int) -> tuple[Tensor | None, T]:
            absorb_rows(layer, spot, rows)
            bias: Tensor | None = None if place.bias is None else place.bias[at : at + len(rows)]
            bias = bias if change is None else change.move(rows, bias, at)
            return bias, then(rows, at)

        together = 1 if change is None else change.together
        found = list(self.source.pieces(f"{self.arch.layers}.{index}.{name}.weight", moved, together))
        if biases := [bias for bias, _ in found if bias is not None]:
            place.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        return [made for _, made in found]

    def _pack(
        self, where: str, packing: checkpoint.Packing, scale: Tensor | None, rows: Float[Tensor, "rows n"], at: int
    ) -> None:
        """Quantize rows of the linear at `where` and put their codes to the others'."""
        with _named(where):
            found = self.task.quantizer(rows, None, self.task.weights, scale)
        packing.add(found, at)

    def _place(self, index: int) -> dict[str, Any]:
        return {"heads": self.source.config.num_key_value_heads, "last": index == len(self.layers) - 1}

    def _begin(self) -> None:
        """What enters the first layer."""
        embedding = Tensors.of([self.shards / EMBEDDING])
        self.held_out.begin(embedding)
        self.taught.begin(embedding)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """An error within is said to be of the layer at `path`."""
    try:
        yield
    except LatmixError as error:
        raise type(error)(f"{path}.{error}") from error


def _at(path: str, by_linear: dict[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in by_linear.items()}
