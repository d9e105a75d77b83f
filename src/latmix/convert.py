"""From the original's layers to packed ones: one pass over the disk, one layer in memory.

Each layer is read, its norm gains absorbed, folded, checked, its weights quantized to what the quantized layers before
it produce, written, and forgotten; the held-out windows go along and are measured at the end. A layer is done when its
file is there, and what enters the next one is on the disk before that: so a pass that was killed goes on with the layer
it was at. Where nothing is calibrated and nothing measured, no activation is computed.
"""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latmix.archs import Input
from latmix.errors import LatmixError
from latmix.eval.heldout import HeldOut, Measured
from latmix.model import checkpoint
from latmix.model.attach import plain_linear, seen_by_head
from latmix.model.calibrate import forward, layer_arguments, moment, quantize_layer
from latmix.model.checkpoint import EMBEDDING, HEAD, KEPT, layer_file
from latmix.model.fit import fit, fitted
from latmix.model.fold import absorb, absorb_layer, fold_embedding, fold_head, fold_layer
from latmix.model.inputs import quantize_layer_inputs
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear
from latmix.model.source import Source, empty
from latmix.model.states import States, embedded
from latmix.model.tensors import Rows, Tensors, metadata, write
from latmix.numerics import BlockFormat
from latmix.progress import Progress
from latmix.stages import Stages
from latmix.transforms import evaluated_once
from latmix.weights import WeightQuantizer


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
    of the calibration windows, if the quantizer needs them, and three times that for the held-out ones.
    """

    def __init__(self, task: Task, shards: Path, work: Path, stages: Stages) -> None:
        self.task, self.shards, self.stages = task, shards, stages
        self.source, self.arch, self.maps = task.source, task.source.arch, task.maps
        self.model, self.wide = task.source.skeleton(), copy.deepcopy(task.maps).double()
        self.layers = layers(self.model, self.arch)
        self.arguments = layer_arguments(self.model, self.arch, task.taught.shape[1])
        self.held_out = HeldOut(self.source, self.maps, task.held_out, work, self.arguments)
        self.taught = States(work, "taught", task.taught.shape, self.source.config.hidden_size)

    @torch.no_grad()
    def run(self, progress: Progress) -> None:
        """Do what is not done yet. Raises: LatmixError: bad numbers, a quantizer that failed, a full disk."""
        with evaluated_once(self.maps.shared()), evaluated_once(self.wide.shared()):
            if not (self.shards / EMBEDDING).exists():
                with self.stages.stage("fold"):
                    self._embedding()
            left = [index for index in range(len(self.layers)) if not (self.shards / layer_file(index)).exists()]
            progress.stage("quantize", len(left))
            for index in left:
                with evaluated_once(self.maps.of_layer(index)), evaluated_once(self.wide.of_layer(index)):
                    self._layer(index)
                self.held_out.drop(index)
                self.taught.drop(index)
                self.stages.save()
                progress.advance(f"layer {index}")
            if not (self.shards / HEAD).exists():
                with self.stages.stage("fold"):
                    self._head()

    def measured(self) -> Measured | None:
        """None where there are no held-out windows."""
        return self.held_out.measured(self.model, Tensors.of([self.shards / HEAD]))

    def notes(self) -> dict[str, dict[str, Any]]:
        """What the layers' files say of how they came about: errors by place, damping and dead inputs by linear."""
        every: dict[str, dict[str, Any]] = {"errors": {}, "damping": {}, "dead_inputs": {}}
        for index in range(len(self.layers)):
            words = metadata(self.shards / layer_file(index))
            for key, found in every.items():
                found |= json.loads(words.get(key, "{}"))
        return every

    def _layer(self, index: int) -> None:
        task, layer, path, stage = self.task, self.layers[index], f"{self.arch.layers}.{index}", self.stages.stage
        if index == 0:
            self._begin()
        with stage("load"):
            self.source.fill(layer, path)
            absorb_layer(layer, self.arch)
        with stage("measure"):
            errors = self.held_out.original(layer, index, task.activations)
        with stage("fold"):
            heads, last = self.source.config.num_key_value_heads, index == len(self.layers) - 1
            fold_layer(layer, self.arch, self.wide, index, heads=heads, last=last)
        with stage("measure"):
            inputs = quantize_layer_inputs(layer, self.arch, self.maps, index, None)
            self.held_out.folded(layer, index)
            inputs.remove()
        with stage("quantize"):
            checkpoint.round_kept(layer, self.arch.linears)
            inputs = quantize_layer_inputs(layer, self.arch, self.maps, index, task.activations)
            try:
                found = quantize_layer(layer, self.arch, task.quantizer, task.weights, self._moment(index))
            except LatmixError as error:
                raise type(error)(f"{path}.{error}") from error
            if task.quantizer.needs_hessian:
                self.taught.put(index + 1, forward(layer, self.arguments[index], self.taught.at(index)))
        with stage("measure"):
            self.held_out.quantized(layer, index)
            inputs.remove()
        for name in found.quantized:
            empty(linear(layer, name), "weight")  # its codes are what is written
        with stage("save"):
            notes = {"errors": errors, "damping": _at(path, found.damping), "dead_inputs": _at(path, found.dead)}
            words = {key: json.dumps(value) for key, value in notes.items() if value}
            checkpoint.write_layer(self.shards / layer_file(index), path, layer, found.quantized, words)
        empty(layer)

    def _begin(self) -> None:
        """What enters the first layer."""
        embedding = Tensors.of([self.shards / EMBEDDING])
        self.held_out.begin(embedding)
        if self.task.quantizer.needs_hessian:
            table = embedding.tensor(f"{self.arch.embedding}.weight")
            self.taught.put(0, embedded(table, self.task.taught))

    def _moment(self, index: int) -> Callable[[Input], Float[Tensor, "n n"]] | None:
        if not self.task.quantizer.needs_hessian:
            return None
        return lambda spot: moment(self.layers[index], self.arguments[index], self.taught.at(index), spot)

    def _embedding(self) -> None:
        name, stream = f"{self.arch.embedding}.weight", self.wide.stream(self.arch)
        pieces = self.source.pieces(name)
        moved = pieces if stream is None else (fold_embedding(piece, stream) for piece in pieces)
        shape = self.source.tensors.stored[name].shape
        write(self.shards / EMBEDDING, {name: Rows(shape, KEPT, (piece.to(KEPT) for piece in moved))}, {})

    def _head(self) -> None:
        """Final norm and head; the norm's gain is in the head, whose bias the stream's shift makes."""
        norm, head = f"{self.arch.final_norm}.weight", f"{self.arch.head}.weight"
        gain, stream = self.source.tensor(norm), self.wide.stream(self.arch)
        biases: list[Tensor] = []

        def pieces() -> Iterator[Tensor]:
            for piece in self.source.pieces(head):
                absorb(gain, piece)
                rows = plain_linear(piece, None) if stream is None else fold_head(plain_linear(piece, None), stream)
                if rows.bias is not None:
                    biases.append(rows.bias.to(KEPT))
                yield rows.weight.to(KEPT)

        shape = self.source.tensors.stored[self.source.name(head)].shape
        tensors: dict[str, Tensor | Rows] = {norm: torch.ones_like(gain, dtype=KEPT), head: Rows(shape, KEPT, pieces())}
        if stream is not None and seen_by_head(stream).shift is not None:
            tensors[f"{self.arch.head}.bias"] = Rows(shape[:1], KEPT, biases)  # full once the head is written
        write(self.shards / HEAD, tensors, {})


def _at(path: str, by_linear: dict[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in by_linear.items()}


@torch.no_grad()
def fit_maps(source: Source, maps: Maps, taught: Int[Tensor, "learn window"], work: Path, progress: Progress) -> None:
    """Fit every online map that is fitted, in place: a pass over the layers of the unquantized model, one in memory.

    Cost: a (partial) forward of each layer for each input with such a map; nothing where there is none.
    Raises: LatmixError: a folded map changes the basis that a fitted one reads, or a full disk.
    """
    if not any(fitted(maps, source.arch, index) for index in range(source.layers)):
        return
    model = source.skeleton()
    arguments = layer_arguments(model, source.arch, taught.shape[1])
    states = States(work, "fit", taught.shape, source.config.hidden_size)
    states.put(0, embedded(source.tensors.tensor(f"{source.arch.embedding}.weight"), taught))
    progress.stage("fit", source.layers)
    for index, layer in enumerate(layers(model, source.arch)):
        with source.filled(layer, f"{source.arch.layers}.{index}"):
            absorb_layer(layer, source.arch)
            seen = partial(moment, layer, arguments[index])
            fit(maps, source.arch, index, layer, lambda spot: seen(states.at(index), spot))  # noqa: B023
            states.put(index + 1, forward(layer, arguments[index], states.at(index)))
        states.drop(index)
        progress.advance(f"layer {index}")
    states.drop(source.layers)
