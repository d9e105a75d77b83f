"""Folding: maps disappear into weights and biases, in float64, cast back once.

Two steps, each function-preserving by itself where the maps are exact: `absorb_gains` moves every norm's gain into the
linears that read it (and unties the head from the embedding, which from then on live in different bases); `fold` moves
linears into their bases (`fold_linear`). Either can be done a layer or a linear at a time.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.archs import Arch, Input
from latmix.model.attach import (
    Attached,
    MovedEmbedding,
    MovedHead,
    MovedLinear,
    MovedNorm,
    added_shifts,
    linear_maps,
    seen_by_head,
)
from latmix.model.fold_linear import Folding, fold_linear
from latmix.model.inputs import QuantizedInputs, quantize_inputs
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear
from latmix.model.tensors import rows
from latmix.numerics import BlockFormat
from latmix.transforms import Transform, evaluated_once


@torch.no_grad()
def absorb_gains(model: PreTrainedModel, arch: Arch) -> None:
    """Fold every norm's gain into its readers and set it to one; untie the head. Exact up to rounding."""
    head = linear(model, arch.head)
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    absorb_head(model, arch)
    for layer in layers(model, arch):
        absorb_layer(layer, arch)


@torch.no_grad()
def absorb_head(model: PreTrainedModel, arch: Arch) -> None:
    """The same for the last norm and the head, whose weight is its own."""
    gain = _gain(model, arch.final_norm)
    model.config.tie_word_embeddings = False
    absorb(gain, linear(model, arch.head).weight)
    gain.fill_(1.0)


@torch.no_grad()
def absorb_layer(layer: nn.Module, arch: Arch) -> None:
    """The same for one layer."""
    for spot in arch.inputs:
        for reader in spot.readers:
            absorb_rows(layer, spot, linear(layer, reader).weight)
    reset_gains(layer, arch)


def absorb_rows(layer: nn.Module, spot: Input, weight: Float[Tensor, "some n"]) -> None:
    """The same for rows of one of the linears that read an input. The gain stays as it is, for the others."""
    if spot.norm is not None:
        absorb(_gain(layer, spot.norm), weight)


def reset_gains(layer: nn.Module, arch: Arch) -> None:
    """What is left of the gains when every reader has absorbed its own."""
    for spot in arch.inputs:
        if spot.norm is not None:
            _gain(layer, spot.norm).fill_(1.0)


def absorb(gain: Float[Tensor, " n"], weight: Float[Tensor, "out n"]) -> None:
    """Scale the columns of a reader, in place: a single product, which float64 would not make more exact."""
    weight.mul_(gain)


def _gain(owner: nn.Module, norm: str) -> Tensor:
    gain = owner.get_submodule(norm).weight
    assert isinstance(gain, Tensor)
    return gain


@torch.no_grad()
def fold(attached: Attached, activations: BlockFormat | None) -> QuantizedInputs:
    """Make the attached linears, head and embedding plain and quantize their inputs anew, in place; tensors that are
    shared with other models stay as they are.

    Cost: one pass over the weights in float64. Raises: FailedError: a folded linear is not what it has to be.
    """
    model, arch = attached.model, attached.arch
    wide = copy.deepcopy(attached.maps).double()
    _detach(attached)
    _fold_layers(model, arch, wide)
    with evaluated_once(wide):
        if (stream := wide.stream(arch)) is not None:
            embedding = model.get_submodule(arch.embedding)
            table = torch.cat([fold_embedding(piece, stream) for piece in rows(embedding.weight)])  # type: ignore[arg-type]
            embedding.weight = nn.Parameter(table, requires_grad=False)
            head = linear(model, arch.head)
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            fold_linear(head, head_folding(head.in_features, stream))
    return quantize_inputs(model, arch, attached.maps, activations)


def _detach(attached: Attached) -> None:
    """The plain modules stand in their places again, unmoved; nothing is quantized."""
    attached.inputs.remove()
    inner = {MovedLinear: "linear", MovedHead: "linear", MovedEmbedding: "embedding", MovedNorm: "norm"}
    for path, module in list(attached.model.named_modules()):
        if type(module) in inner:
            attached.model.set_submodule(path, getattr(module, inner[type(module)]))


def _fold_layers(model: PreTrainedModel, arch: Arch, wide: Maps) -> None:
    every, heads = layers(model, arch), model.config.num_key_value_heads
    with evaluated_once(wide):
        for index, layer in enumerate(every):
            for name in arch.linears:
                place = linear(layer, name)
                place.weight = nn.Parameter(place.weight.clone(), requires_grad=False)
            fold_layer(layer, arch, wide, index, heads=heads, last=index == len(every) - 1)


@torch.no_grad()
def fold_layer(layer: nn.Module, arch: Arch, maps: Maps, index: int, *, heads: int, last: bool) -> None:
    """Move the linears and norms of a plain layer into their bases, in place.

    maps: in float64. heads: KV heads. last: no layer follows.
    """
    for name in arch.linears:
        change = folding(layer, arch, maps, index, name, heads=heads, last=last)
        if change is not None:
            fold_linear(linear(layer, name), change)
    fold_norms(layer, arch, maps, index)


def folding(
    layer: nn.Module, arch: Arch, maps: Maps, index: int, name: str, *, heads: int, last: bool
) -> Folding | None:
    """What moves a linear of a plain layer, which need not have its weights; None where it stays as it is."""
    source, target = linear_maps(arch, maps, layer, name, index, heads)
    if source is None and target is None:
        return None
    shifts = added_shifts(arch, name, target, last=last)
    width = linear(layer, name).in_features
    return Folding(width, source, target, shifts=shifts, where=f"Layer {index}, {name}")


def head_folding(width: int, stream: Transform) -> Folding:
    """What moves the head."""
    return Folding(width, seen_by_head(stream), None, shifts=0, where="The head")


def fold_norms(layer: nn.Module, arch: Arch, maps: Maps, index: int) -> None:
    """The same for the gains that write a basis, once they are all one."""
    for site in arch.sites:
        if (norm := arch.norm(site)) is not None and (map := maps.folded(site.name, index)) is not None:
            gain = _gain(layer, norm)  # perhaps another model's too
            moved = map.linear(gain.double()).to(gain.dtype)
            layer.get_submodule(norm).weight = nn.Parameter(moved, requires_grad=False)


def fold_embedding(table: Float[Tensor, "tokens n"], stream: Transform) -> Float[Tensor, "tokens n"]:
    """Rows of the embedding in the stream's basis, shift included."""
    moved_table: Tensor = stream(table.double()).to(table.dtype)
    return moved_table
