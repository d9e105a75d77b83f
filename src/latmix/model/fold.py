"""Folding: maps disappear into weights and biases, in float64, cast back once.

Two steps, each function-preserving by itself where the maps are exact: `absorb_gains` moves every norm's gain into the
linears that read it (and unties the head from the embedding, which from then on live in different bases); `fold`
replaces attached linears by plain ones, on whose inputs quantizers and online transforms stay.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.model.attach import (
    Attached,
    MovedEmbedding,
    MovedHead,
    MovedLinear,
    MovedNorm,
    linear_maps,
    seen_by_head,
)
from latmix.model.inputs import QuantizedInputs, quantize_inputs
from latmix.model.parts import layers, linear
from latmix.numerics import BlockFormat
from latmix.transforms import evaluated_once


@torch.no_grad()
def absorb_gains(model: PreTrainedModel, arch: Arch) -> None:
    """Fold every norm's gain into its readers and set it to one; untie the head. Exact up to rounding."""
    head = linear(model, arch.head)
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    _absorb(_gain(model, arch.final_norm), [head])
    for layer in layers(model, arch):
        for spot in arch.inputs:
            if spot.norm is not None:
                _absorb(_gain(layer, spot.norm), [linear(layer, reader) for reader in spot.readers])


def _gain(owner: nn.Module, norm: str) -> Tensor:
    gain = owner.get_submodule(norm).weight
    assert isinstance(gain, Tensor)
    return gain


def _absorb(gain: Tensor, readers: list[nn.Linear]) -> None:
    for reader in readers:
        reader.weight.copy_(reader.weight.double() * gain.double())
    gain.fill_(1.0)


@torch.no_grad()
def fold(attached: Attached, activations: BlockFormat | None) -> QuantizedInputs:
    """Make the attached linears, head and embedding plain, in place, and quantize their inputs anew.

    Cost: one pass over the weights in float64.
    """
    model, arch = attached.model, attached.arch
    maps = copy.deepcopy(attached.maps).double()
    heads = model.config.num_key_value_heads
    attached.inputs.remove()
    with evaluated_once(maps):
        for index, layer in enumerate(layers(model, arch)):
            for name in arch.linears:
                attached_linear = layer.get_submodule(name)
                if isinstance(attached_linear, MovedLinear):
                    source, target = linear_maps(arch, maps, layer, name, index, heads)
                    layer.set_submodule(name, attached_linear.fold(source, target))
            for site in arch.sites:
                if (norm := arch.norm(site)) is not None and (map := maps.folded(site.name, index)) is not None:
                    attached_norm = layer.get_submodule(norm)
                    assert isinstance(attached_norm, MovedNorm)
                    layer.set_submodule(norm, attached_norm.fold(map))
        head, embedding = model.get_submodule(arch.head), model.get_submodule(arch.embedding)
        (site,) = (site for site in arch.sites if site.stream)
        if isinstance(head, MovedHead) and isinstance(embedding, MovedEmbedding):
            stream_map = maps.folded(site.name, 0)
            assert stream_map is not None
            model.set_submodule(arch.head, head.fold(seen_by_head(stream_map)))
            model.set_submodule(arch.embedding, embedding.fold(stream_map))
    return quantize_inputs(model, arch, attached.maps, activations)
