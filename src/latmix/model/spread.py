"""A whole model for what couples all layers, without ever being whole in one place.

Layer by layer is read, its norm gains absorbed, and, where there are several ranks, sharded over them before the next
is read. So a rank holds its part of all layers, one layer whole for a moment, and embedding and head. Where a GPU has
no room for that, the layers wait in the CPU's memory (FSDP2's offloading), and one at a time comes to the GPU.
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
"""Share of a GPU's free memory that the layers of teacher and student may take; the rest is for activations."""


def spread(source: Source, progress: Progress) -> PreTrainedModel:
    """Frozen, in float32, its gains absorbed and its head untied. Raises: DamagedError: a tensor cannot be read."""
    model, arch = source.skeleton(), source.arch
    for path in (arch.embedding, arch.final_norm, arch.head):
        source.fill(model.get_submodule(path), path)
    absorb_head(model, arch)
    offload = too_large(source, 1.0 if ranks.world() == 1 else 2 / ranks.world())
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
    model, arch = source.skeleton(), source.arch
    for path in (arch.final_norm, arch.head):
        source.fill(model.get_submodule(path), path)
    absorb_head(model, arch)
    return linear(model, arch.head)


def too_large(source: Source, numbers: float) -> bool:
    """Whether a GPU has no room for so many float32 numbers for each weight of the layers: 1 where teacher and student
    share theirs, 2 over the ranks where each has its own."""
    if not torch.cuda.is_available():
        return False
    layers = (math.prod(x.shape) for name, x in source.tensors.stored.items() if name.startswith(source.arch.layers))
    return bool(4 * sum(layers) * numbers > ROOM * torch.cuda.mem_get_info()[0])
