"""A whole model for what couples all layers, without ever being whole in one place.

Layer by layer is read, its norm gains absorbed, and, where there are several ranks, sharded over them before the next
is read; so are embedding and head. A rank holds its part of all of them, and one whole for a moment. Where a GPU has no
room for that, they wait in the CPU's memory (FSDP2's offloading), and one at a time comes to the GPU.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from latmix import ranks
from latmix.model.fold import absorb_head, absorb_layer
from latmix.model.parts import layers, linear
from latmix.model.source import Source
from latmix.progress import Progress
from latmix.sharding import join_layers, shard

ROOM = 0.4
"""Share of a GPU's free memory that teacher and student may take; the rest is for activations."""


def spread(source: Source, progress: Progress) -> PreTrainedModel:
    """Frozen, in float32, its gains absorbed and its head untied. Raises: DamagedError: a tensor cannot be read."""
    model, arch = source.skeleton(), source.arch
    offload = _offload(source)
    embedding = model.get_submodule(arch.embedding)
    source.fill(embedding, arch.embedding)
    shard(embedding, offload)
    _fill_head(source, model, offload)
    progress.stage("load", source.layers)
    for index, layer in enumerate(layers(model, arch)):
        source.fill(layer, f"{arch.layers}.{index}")
        absorb_layer(layer, arch)
        shard(layer, offload)
        progress.advance()
    join_layers(model.base_model)
    return model


def head_of(source: Source) -> nn.Linear:
    """The head alone of the model that `spread` makes. Raises: DamagedError: a tensor cannot be read."""
    model = source.skeleton()
    _fill_head(source, model, _offload(source))
    return linear(model, source.arch.head)


def _fill_head(source: Source, model: PreTrainedModel, offload: bool) -> None:
    for path in (source.arch.final_norm, source.arch.head):
        source.fill(model.get_submodule(path), path)
    absorb_head(model, source.arch)
    shard(linear(model, source.arch.head), offload)


def _offload(source: Source) -> bool:
    """In one process teacher and student share their weights, of several each has its own."""
    numbers = 1.0 if ranks.world() == 1 else 2 / ranks.world()
    return too_large(source, numbers, numbers)


def too_large(source: Source, layers: float, tables: float) -> bool:
    """Whether a GPU has no room for so many float32 numbers for each weight of the layers, of embedding and head."""
    if not torch.cuda.is_available():
        return False
    stored, arch = source.tensors.stored, source.arch
    inner = sum(math.prod(x.shape) for name, x in stored.items() if name.startswith(arch.layers))
    outer = 2 * math.prod(stored[f"{arch.embedding}.weight"].shape)
    return bool(4 * (layers * inner + tables * outer) > ROOM * torch.cuda.mem_get_info()[0])
