"""One linear moved between two bases: in place and in float64, some rows at a time, so that little stands in float64.

Rows that the target map mixes go together: a block of them where it is made of blocks, all of them where it is dense.
The result is checked, in float64, against what it has to be: the old linear between the maps, which there act on
vectors and not on weights.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import FailedError
from latmix.model.attach import moved
from latmix.model.products import VECTORS, products
from latmix.model.source import pick_device
from latmix.model.tensors import PIECE, rows
from latmix.transforms import Transform
from latmix.transforms.hadamard import Hadamard, joined

AGREEMENT = 2.0**-20
"""Largest relative error of a folded linear on random vectors. Casting to float32 makes 2⁻²⁵ on average, float64 with
the worst condition number allowed (`maps.CONDITION`) 2⁻³³: a sixteenth of this at most."""


class Folding:
    """A linear's change of basis, as `attach.moved` has it. `where`: what errors call the linear.

    Attributes:
        together: rows that go together.
    """

    def __init__(
        self, width: int, source: Transform | None, target: Transform | None, *, shifts: int, where: str
    ) -> None:
        source, target = (map and joined(map) for map in (source, target))
        self._source, self._target, self._shifts, self._where = source, target, shifts, where
        probes = torch.randn(VECTORS, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        probes = probes.to(pick_device())
        before = probes if source is None else source.inverse(probes)
        self._probes, self._before = (x.T.contiguous().T for x in (probes, before))
        self.together = 1 if target is None else target.order

    @torch.no_grad()
    def move(
        self, weight: Float[Tensor, "some n"], bias: Float[Tensor, " some"] | None, at: int
    ) -> Float[Tensor, " some"] | None:
        """Put rows into the new basis, in place, and check them; returns their bias.

        at: the first one's number; they begin and end where a run of `together` does.

        Raises: FailedError: they are not what they have to be.
        """
        target = self._target and self._target.part(slice(at, at + len(weight)))
        wanted = _outputs(weight, bias, self._before)
        if target is not None:
            wanted = target.linear(wanted) + (0.0 if target.shift is None else self._shifts * target.shift)
        wide = _move(weight, bias, self._source, target, self._shifts)
        bias = None if wide is None else wide.to(weight.dtype)
        error = (_outputs(weight, bias, self._probes) - wanted).norm()
        error /= wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)
        if not error <= AGREEMENT:  # NaN fails too
            raise FailedError(
                f"{self._where}: folding misses by {float(error):.1e} of the output, more than {AGREEMENT:.1e}."
            )
        return bias


def fold_linear(place: nn.Linear, folding: Folding) -> None:
    """Move a linear, its weight in place. Raises: FailedError: it is not what it has to be."""
    found, at = list[Tensor](), 0
    for some in rows(place.weight, folding.together):
        bias = folding.move(some, None if place.bias is None else place.bias[at : at + len(some)], at)
        at += len(some)
        if bias is not None:
            found.append(bias)
    if found:
        place.bias = nn.Parameter(torch.cat(found), requires_grad=False)


def _move(
    weight: Tensor, bias: Tensor | None, source: Transform | None, target: Transform | None, shifts: int
) -> Tensor | None:
    """Move the weight in place; returns the bias in float64. Where it is large, no more than a piece stands in float64;
    but where both maps act, what stands between them would: unless groups of columns go through both."""
    bias = None if bias is None else bias.double()
    if weight.numel() <= PIECE:
        wide, bias = moved(weight.double(), bias, source, target, shifts=shifts)
        weight.copy_(wide)
        return bias
    if target is None:
        return _move_rows(weight, bias, source, weight)
    if source is None or (isinstance(source, Hadamard) and source.order < source.size):
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
    order = 1 if source is None else source.order
    step, moved_bias = max(order, PIECE // len(weight) // order * order), bias
    for at in range(0, weight.shape[1], step):
        some = slice(at, min(at + step, weight.shape[1]))
        part, moved_bias = moved(weight[:, some].double(), bias, source and source.part(some), target, shifts=shifts)
        into[:, some] = part
    return moved_bias


def _outputs(weight: Tensor, bias: Tensor | None, x: Float[Tensor, "probes n"]) -> Float[Tensor, "probes out"]:
    """What the linear makes of x, in float64."""
    out = products(weight, x)
    return out if bias is None else out + bias.double()
