"""Folding: maps disappear into weights and biases, in float64, cast back once.

Two steps, each function-preserving by itself where the maps are exact: `absorb_gains` moves every norm's gain into the
linears that read it (and unties the head from the embedding, which from then on live in different bases); `fold` moves
linears into their bases. Either is done a layer at a time, and large matrices a piece at a time, so that little stands
in float64. Every folded linear is checked, in float64, against what it has to be: the old linear between the maps,
which there act on vectors and not on weights.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.errors import FailedError
from latmix.model.attach import (
    Attached,
    MovedEmbedding,
    MovedHead,
    MovedLinear,
    MovedNorm,
    added_shifts,
    linear_maps,
    moved,
    plain_linear,
    seen_by_head,
)
from latmix.model.checkpoint import share
from latmix.model.inputs import QuantizedInputs, quantize_inputs
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear, linears
from latmix.model.tensors import PIECE, rows
from latmix.numerics import BlockFormat
from latmix.transforms import Transform, evaluated_once

AGREEMENT = 2.0**-20
"""Largest relative error of a folded linear on random vectors. Casting to float32 makes 2⁻²⁵ on average, float64 with
the worst condition number allowed (`maps.CONDITION`) 2⁻³³: a sixteenth of this at most."""

PROBES = 8  # random vectors a folded linear is checked on


@torch.no_grad()
def absorb_gains(model: PreTrainedModel, arch: Arch) -> None:
    """Fold every norm's gain into its readers and set it to one; untie the head. Exact up to rounding."""
    head, gain = linear(model, arch.head), _gain(model, arch.final_norm)
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    absorb(gain, head.weight)
    gain.fill_(1.0)
    for layer in layers(model, arch):
        absorb_layer(layer, arch)


@torch.no_grad()
def absorb_layer(layer: nn.Module, arch: Arch) -> None:
    """The same for one layer."""
    for spot in arch.inputs:
        if spot.norm is not None:
            gain = _gain(layer, spot.norm)
            for reader in spot.readers:
                absorb(gain, linear(layer, reader).weight)
            gain.fill_(1.0)


def absorb(gain: Float[Tensor, " n"], weight: Float[Tensor, "out n"]) -> None:
    """Scale the columns of a reader, in place."""
    for piece in rows(weight):
        piece.copy_(piece.double() * gain.double())


def _gain(owner: nn.Module, norm: str) -> Tensor:
    gain = owner.get_submodule(norm).weight
    assert isinstance(gain, Tensor)
    return gain


@torch.no_grad()
def fold(attached: Attached, activations: BlockFormat | None) -> QuantizedInputs:
    """Make the attached linears, head and embedding plain, in place, and quantize their inputs anew.

    Cost: one pass over the weights in float64. Raises: FailedError: a folded linear is not what it has to be.
    """
    model, arch = attached.model, attached.arch
    wide = copy.deepcopy(attached.maps).double()
    _detach(attached)
    every, heads = layers(model, arch), model.config.num_key_value_heads
    with evaluated_once(wide):
        for index, layer in enumerate(every):
            fold_layer(layer, arch, wide, index, heads=heads, last=index == len(every) - 1)
        if (stream := wide.stream(arch)) is not None:
            embedding = model.get_submodule(arch.embedding)
            table = torch.cat([fold_embedding(piece, stream) for piece in rows(embedding.weight)])  # type: ignore[arg-type]
            embedding.weight = nn.Parameter(table, requires_grad=False)
            model.set_submodule(arch.head, fold_head(linear(model, arch.head), stream))
    return quantize_inputs(model, arch, attached.maps, activations)


def _detach(attached: Attached) -> None:
    """The plain modules stand in their places again, unmoved; nothing is quantized."""
    attached.inputs.remove()
    inner = {MovedLinear: "linear", MovedHead: "linear", MovedEmbedding: "embedding", MovedNorm: "norm"}
    for path, module in list(attached.model.named_modules()):
        if type(module) in inner:
            attached.model.set_submodule(path, getattr(module, inner[type(module)]))


@torch.no_grad()
def fold_layer(layer: nn.Module, arch: Arch, maps: Maps, index: int, *, heads: int, last: bool) -> None:
    """Move the linears and norms of a plain layer into their bases, in place.

    maps: in float64. heads: KV heads. last: no layer follows.
    """
    for name in arch.linears:
        source, target = linear_maps(arch, maps, layer, name, index, heads)
        if source is not None or target is not None:
            shifts = added_shifts(arch, name, target, last=last)
            try:
                layer.set_submodule(name, folded(linear(layer, name), source, target, shifts=shifts))
            except FailedError as error:
                raise FailedError(f"Layer {index}, {name}: {error}") from error
    for site in arch.sites:
        if (norm := arch.norm(site)) is not None and (map := maps.folded(site.name, index)) is not None:
            gain = _gain(layer, norm)
            layer.get_submodule(norm).weight = nn.Parameter(
                map.linear(gain.double()).to(gain.dtype), requires_grad=False
            )


def folded_weights(model: PreTrainedModel, arch: Arch, maps: Maps) -> dict[str, Tensor]:
    """What the linears of a plain model, its gains absorbed, hold under the maps, by path; the model is left alone."""
    folded, wide = share(model), copy.deepcopy(maps).double()
    every, heads = layers(folded, arch), model.config.num_key_value_heads
    with evaluated_once(wide):
        for index, layer in enumerate(every):
            fold_layer(layer, arch, wide, index, heads=heads, last=index == len(every) - 1)
    return {path: place.weight for path, place in linears(folded, arch).items()}


def fold_embedding(table: Float[Tensor, "tokens n"], stream: Transform) -> Float[Tensor, "tokens n"]:
    """Rows of the embedding in the stream's basis, shift included."""
    moved_table: Tensor = stream(table.double()).to(table.dtype)
    return moved_table


def fold_head(head: nn.Linear, stream: Transform) -> nn.Linear:
    """The head, or some rows of it, as it reads the stream."""
    return folded(head, seen_by_head(stream), None, shifts=0)


def folded(old: nn.Linear, source: Transform | None, target: Transform | None, *, shifts: int) -> nn.Linear:
    """The linear between two bases, as `attach.moved` has it, checked.

    Raises: FailedError: it is not what it has to be.
    """
    new = _in_pieces(old, source, target, shifts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, old.in_features, generator=generator, dtype=torch.float64).to(old.weight.device)
    wanted = _wide(old, x if source is None else source.inverse(x))
    if target is not None:
        wanted = target.linear(wanted) + (0.0 if target.shift is None else shifts * target.shift)
    error = (_wide(new, x) - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)
    if not error <= AGREEMENT:  # NaN fails too
        raise FailedError(f"folding misses by {float(error):.1e} of the output, more than {AGREEMENT:.1e}.")
    return new


def _in_pieces(old: nn.Linear, source: Transform | None, target: Transform | None, shifts: int) -> nn.Linear:
    """Rows do not depend on one another under the source map, columns under the target map."""
    dtype, weight = old.weight.dtype, old.weight
    bias: Tensor | None = None if old.bias is None else old.bias.double()
    if source is not None:
        step = max(1, PIECE // weight.shape[1])
        moved_rows = torch.empty_like(weight, dtype=dtype if target is None else torch.float64)
        biases = list[Tensor]()
        for at in range(0, len(weight), step):
            some = slice(at, at + step)
            part, shift = moved(weight[some].double(), None if bias is None else bias[some], source, None, shifts=0)
            moved_rows[some] = part
            biases += [] if shift is None else [shift]
        weight, bias = moved_rows, torch.cat(biases) if biases else None
    if target is not None:
        step = max(1, PIECE // len(weight))
        moved_columns = torch.empty_like(weight, dtype=dtype)
        moved_bias: Tensor | None = None
        for at in range(0, weight.shape[1], step):
            part, moved_bias = moved(weight[:, at : at + step].double(), bias, None, target, shifts=shifts)
            moved_columns[:, at : at + step] = part
        weight, bias = moved_columns, moved_bias
    return plain_linear(weight, None if bias is None else bias.to(dtype))


def _wide(linear: nn.Linear, x: Float[Tensor, "probes n"]) -> Float[Tensor, "probes out"]:
    """In float64."""
    out = torch.cat([F.linear(x, piece.double()) for piece in rows(linear.weight)], dim=-1)
    return out if linear.bias is None else out + linear.bias.double()
