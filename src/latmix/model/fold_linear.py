"""One linear moved between two bases: in place and in float64, a piece at a time, so that little stands in float64.

The result is checked, in float64, against what it has to be: the old linear between the maps, which there act on
vectors and not on weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from latmix.errors import FailedError
from latmix.model.attach import moved
from latmix.model.tensors import PIECE, rows
from latmix.transforms import Transform
from latmix.transforms.hadamard import Hadamard

AGREEMENT = 2.0**-20
"""Largest relative error of a folded linear on random vectors. Casting to float32 makes 2⁻²⁵ on average, float64 with
the worst condition number allowed (`maps.CONDITION`) 2⁻³³: a sixteenth of this at most."""

PROBES = 8  # random vectors a folded linear is checked on


@torch.no_grad()
def fold_linear(place: nn.Linear, source: Transform | None, target: Transform | None, *, shifts: int) -> None:
    """Put the linear between two bases, as `attach.moved` has it, its weight in place, and check it.

    Raises: FailedError: it is not what it has to be.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, place.in_features, generator=generator, dtype=torch.float64).to(place.weight.device)
    wanted = _wide(place, x if source is None else source.inverse(x))
    if target is not None:
        wanted = target.linear(wanted) + (0.0 if target.shift is None else shifts * target.shift)
    bias = _move(place.weight, place.bias, source, target, shifts)
    if bias is not None:
        place.bias = nn.Parameter(bias.to(place.weight.dtype), requires_grad=False)
    error = (_wide(place, x) - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)
    if not error <= AGREEMENT:  # NaN fails too
        raise FailedError(f"folding misses by {float(error):.1e} of the output, more than {AGREEMENT:.1e}.")


def _move(
    weight: Tensor, bias: Tensor | None, source: Transform | None, target: Transform | None, shifts: int
) -> Tensor | None:
    """Move the weight in place; returns the bias in float64. Where both maps act, what stands between them would be
    twice the weight in float64: but under a Hadamard matrix in blocks, groups of columns go through both."""
    bias = None if bias is None else bias.double()
    if target is None:
        return _move_rows(weight, bias, source, weight)
    if source is None or (isinstance(source, Hadamard) and source.order):
        return _move_columns(weight, bias, source, target, shifts, weight)
    between = torch.empty_like(weight, dtype=torch.float64)
    bias = _move_rows(weight, bias, source, between)
    return _move_columns(between, bias, None, target, shifts, weight)


def _move_rows(weight: Tensor, bias: Tensor | None, source: Transform | None, into: Tensor) -> Tensor | None:
    """Rows do not depend on one another under the source map."""
    step, biases = max(1, PIECE // weight.shape[1]), weight.new_empty(len(weight), dtype=torch.float64)
    moved_bias: Tensor | None = None
    for at in range(0, len(weight), step):
        some = slice(at, at + step)
        part, moved_bias = moved(weight[some].double(), None if bias is None else bias[some], source, None, shifts=0)
        into[some] = part
        if moved_bias is not None:
            biases[some] = moved_bias
    return None if moved_bias is None else biases


def _move_columns(
    weight: Tensor, bias: Tensor | None, source: Hadamard | None, target: Transform, shifts: int, into: Tensor
) -> Tensor | None:
    """Columns do not depend on one another under the target map, nor do blocks of them under the source map."""
    order = (source and source.order) or 1
    step, moved_bias = max(order, PIECE // len(weight) // order * order), bias
    for at in range(0, weight.shape[1], step):
        some = slice(at, min(at + step, weight.shape[1]))
        part, moved_bias = moved(weight[:, some].double(), bias, source and source.part(some), target, shifts=shifts)
        into[:, some] = part
    return moved_bias


def _wide(linear: nn.Linear, x: Float[Tensor, "probes n"]) -> Float[Tensor, "probes out"]:
    """In float64."""
    # one room for all: small results kept between large pieces would keep the C library from using their room again
    out, at = x.new_empty(len(x), linear.out_features), 0
    for piece in rows(linear.weight):
        out[:, at : at + len(piece)] = F.linear(x, piece.double())
        at += len(piece)
    return out if linear.bias is None else out + linear.bias.double()
