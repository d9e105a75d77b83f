"""Rounding with feedback: GPTQ within a panel of columns, where each waits for the errors of those before it."""

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.compiled import attempt
from latmix.numerics.formats import BlockFormat
from latmix.numerics.kernels import on_device
from latmix.numerics.rounding import round_to_element


@torch.no_grad()
def round_columns(
    weight: Float[Tensor, "columns out"],
    wanted: Float[Tensor, "columns out"],
    feedback: Float[Tensor, "columns columns"],
    scales: Float[Tensor, "columns out"],
    error: Float[Tensor, "columns out"],
    fmt: BlockFormat,
) -> None:
    """Put the rounded values of a panel in the place of `weight`, and `weight` - values into `error`. A column of the
    weight is a row here; all of it is contiguous.

    Args:
        wanted: the weight, plus the feedback of earlier panels.
        feedback: [i, j], j < i: how the error of column j weighs in column i; the rest is not read.
        scales: one for each number.

    Cost: out·columns²/2 multiply-adds. Float32 takes one kernel, which adds the errors up in another order.
    """
    tensors = (weight, wanted, feedback, scales, error)
    kernels = on_device(tensors) if all(tensor.dtype == torch.float32 for tensor in tensors) else None
    if not (kernels and attempt(kernels.NAME, kernels.round_columns, *tensors, fmt)):
        one_by_one(*tensors, fmt)


def one_by_one(
    weight: Tensor, wanted: Tensor, feedback: Tensor, scales: Tensor, error: Tensor, fmt: BlockFormat
) -> None:
    """The reference of `round_columns`."""
    for i in range(len(weight)):
        target = torch.addmv(wanted[i], error[:i].t(), feedback[i, :i])
        values = round_to_element(target / scales[i], fmt.element, fmt.rounding) * scales[i]
        torch.sub(weight[i], values, out=error[i])
        weight[i] = values
