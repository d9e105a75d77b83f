"""GPTQ on the MX grid: round column by column, and let later columns make up for the errors of earlier ones.

Frantar et al. (2210.17323) propagate errors with the Cholesky factor of H⁻¹. The same codes come out of H itself (LDLQ,
QuIP 2307.13304, theorem 6): with H = N D Nᵀ, N unit upper triangular and D diagonal, the loss of an error E = W − Q is

    tr(E H Eᵀ) = Σ_i D_i ‖column i of E N‖²,      column i of E N = (w_i + Σ_{j<i} e_j N_ji) − q_i,

so each q_i in turn rounds what stands in parentheses. That needs one factorization, no inverse, and W is never
overwritten by accumulated updates: the sum over j is taken once, as a matmul over the earlier panels of columns, and
column by column within the panel. Rows do not know of each other, so a kernel takes a few of them through a whole
panel while their errors stay in the nearest memory (`round_columns`).

Scales are fixed before the loop, from the original weight in its original order, so the order of processing does not
touch the block structure and the result is a plain tensor of the format.

Given up: scales that follow the updated columns (they would tie the order to the blocks), sharing one factor among
weights that read the same input (it would save a few per cent).
"""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from latmix.errors import FailedError, InputError
from latmix.numerics import BlockFormat, Quantized, choose_scales, choose_tensor_scale, encode, round_columns
from latmix.numerics.rounding import finite, widen
from latmix.weights.base import WEIGHT_QUANTIZERS, MoreDamping, WeightQuantizer

DAMPING_LIMIT = 1.0
"""A Hessian that needs more than its own mean diagonal added to become positive definite is no mean of x xᵀ."""
GATHERED = 256  # of its rows that are put into order at a time


@dataclass(frozen=True)
class GPTQ(WeightQuantizer):
    """GPTQ with static scales; under the "search" rule the damped diagonal of the Hessian weights the search.

    Args:
        act_order: process columns by falling H_ii, so that the loudest inputs are rounded while all others can still
            compensate; False: from the first to the last.
        damping: added to the diagonal, in units of its mean; positive, at most `DAMPING_LIMIT`. If H is not positive
            definite with it, it grows tenfold, with a warning, up to that limit.
        search: choose each block's scale by least squared error of the weight (unweighted, as MR-GPTQ does, 2509.23202)
            instead of by the format's rule.
        columns: columns rounded between two matmuls; changes speed, and codes only where a sum falls on a tie.

    Special values: a dead column (H_ii = 0) is rounded to nearest: damping alone is its curvature, so no error moves.
    Raises:
        LatmixError: settings out of range; no Hessian, or one of another size, or not finite, or not positive definite
            at the damping limit; a weight that is not finite.
    Cost: n³/3 + out·n²/2 multiply-adds; for a float64 weight n steps of about 20 small operations besides. 8 n² bytes
        for the factor, taken in float64 and in place; three more copies of the weight, in float32 (float64 for a
        float64 weight).
    """

    act_order: bool = True
    damping: float = 0.01
    search: bool = False
    columns: int = 128
    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= DAMPING_LIMIT:
            raise InputError(f"gptq: damping is {self.damping}; it must be above 0 and at most {DAMPING_LIMIT}.")
        if self.columns < 1:
            raise InputError(f"gptq: columns is {self.columns}; it must be a positive integer.")

    @torch.no_grad()
    def __call__(
        self,
        weight: Float[Tensor, "out n"],
        hessian: Float[Tensor, "n n"] | None,
        format: BlockFormat,
        tensor_scale: Float[Tensor, ""] | None = None,
        cross: Float[Tensor, "n n"] | None = None,
    ) -> Quantized:
        if hessian is None:
            raise InputError("gptq needs the Hessian of the weight's inputs; rtn needs none.")
        wide, hessian = widen(weight), hessian.to(weight.device)
        check_moment("gptq", "Hessian", hessian, wide.shape[-1])
        if not finite(wide):
            raise FailedError("gptq: the weight holds NaN or Inf.")
        diagonal = hessian.diagonal()
        tensor_scale = choose_tensor_scale(wide, format) if tensor_scale is None else tensor_scale
        if self.search:
            scales = choose_scales(wide, dataclasses.replace(format, scale="search"), None, tensor_scale)
        else:
            scales = choose_scales(wide, format, diagonal + self.damping * mean_diagonal(diagonal), tensor_scale)
        order = torch.arange(len(diagonal), device=weight.device)
        if self.act_order:
            order = diagonal.argsort(descending=True, stable=True)
        factor = _factor(hessian, order, self.damping)
        values = _round_columns(wide, scales, factor, order, format, self.columns)
        return dataclasses.replace(encode(values, format, scales, tensor_scale), dtype=weight.dtype)


def check_moment(quantizer: str, name: str, moment: Tensor, n: int) -> None:
    """Raises: LatmixError: it is not of n inputs, or not finite."""
    if moment.shape != (n, n):
        raise InputError(f"{quantizer}: the {name} is {tuple(moment.shape)}; a weight of {n} inputs needs ({n}, {n}).")
    if not finite(moment):
        raise FailedError(f"{quantizer}: the {name} holds NaN or Inf; the calibration activations overflowed.")


def mean_diagonal(diagonal: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """What damping is measured in: the mean of the diagonal; 1 if no input was ever active."""
    mean = diagonal.double().mean()
    return torch.where(mean == 0, torch.ones_like(mean), mean)


def _factor(hessian: Float[Tensor, "n n"], order: Int[Tensor, " n"], damping: float) -> Float64[Tensor, "n n"]:
    """L of H = L Lᵀ, the last column to be processed first: read forwards again, the N of H = N D Nᵀ, but for D."""
    last_first, grown = order.flip(0), damping
    factor = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device).mT  # as LAPACK lays it out
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    while grown <= DAMPING_LIMIT:
        for some, room in zip(last_first.split(GATHERED), factor.mT.split(GATHERED), strict=True):
            room.copy_(hessian.index_select(0, some).index_select(1, last_first))  # faster than both at once
        diagonal = factor.diagonal()
        diagonal.add_(grown * mean_diagonal(diagonal))
        torch.linalg.cholesky_ex(factor, out=(factor, failed))  # in place: the matrix is gone where it fails
        if not failed:
            if grown > damping:
                warnings.warn(MoreDamping(grown), stacklevel=3)
            return factor
        grown *= 10
    raise FailedError(f"gptq: the Hessian is not positive definite, even with damping grown to {DAMPING_LIMIT:g}.")


def _feedback(
    factor: Float64[Tensor, "n n"], start: int, stop: int, dtype: torch.dtype
) -> Float[Tensor, "columns {stop}"]:
    """Rows from start to stop of Nᵀ in processing order; row i weights the errors of the columns before i. Made for
    each panel anew, where it stays in a cache: the whole of it would be another n² numbers, in memory fresh from the
    system."""
    first, last = len(factor) - stop, len(factor) - start
    backwards = factor[first:, first:last] / factor.diagonal()[first:last]
    return backwards.to(dtype).flip(0, 1).t().contiguous()


def _round_columns(
    weight: Float[Tensor, "out n"],
    scales: Float[Tensor, "out blocks"],
    factor: Float64[Tensor, "n n"],
    order: Int[Tensor, " n"],
    format: BlockFormat,
    columns: int,
) -> Float[Tensor, "out n"]:
    """The quantized values. Works on the transpose, in place: a column of the weight is then contiguous."""
    values = weight.t().contiguous().index_select(0, order)
    error = torch.empty_like(values)
    scale_rows, block_of = scales.t().contiguous(), order // format.block
    for start in range(0, len(values), columns):
        stop = min(start + columns, len(values))
        panel, feedback = slice(start, stop), _feedback(factor, start, stop, values.dtype)
        wanted = torch.addmm(values[panel], feedback[:, :start], error[:start])
        here = feedback[:, start:].contiguous()
        round_columns(values[panel], wanted, here, scale_rows[block_of[panel]], error[panel], format)
    return values.index_select(0, order.argsort()).t().contiguous()


WEIGHT_QUANTIZERS.add("gptq", GPTQ)
