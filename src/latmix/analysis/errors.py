"""E(T), the error that a map leaves: E(T) = E‖x − T⁻¹(Q(T(x)))‖² / d, and its share E_B(T) in every block of x.

The error is taken in the original basis, where maps can be compared: a map that amplifies its output has to pay when it
is undone. The blocks of E_B are those of x, whatever T did to them, so their mean is E(T).
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.numerics import BlockFormat, fake_quant
from latmix.numerics.scales import to_blocks
from latmix.transforms import Transform, evaluated_once

BATCH = 256  # tokens at a time


@torch.no_grad()
def block_errors(map: Transform | None, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Float[Tensor, " blocks"]:
    """E_B(T): mean squared error per element in each block of x (float64); `map` None is the identity."""
    total = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    with nullcontext() if map is None else evaluated_once(map):
        for part in x.split(BATCH):
            total += (through(map, part, fmt) - part).double().square().sum(0)
    sizes = to_blocks(torch.ones_like(total), fmt.block).sum(-1)
    return to_blocks(total / len(x), fmt.block).sum(-1) / sizes


def error(map: Transform | None, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> float:
    """E(T). Blocks count by their size."""
    per_block = block_errors(map, x, fmt)
    sizes = to_blocks(torch.ones_like(x[0], dtype=torch.float64), fmt.block).sum(-1)
    return float((per_block * sizes).sum() / sizes.sum())


@torch.no_grad()
def through(map: Transform | None, x: Float[Tensor, "*batch n"], fmt: BlockFormat) -> Float[Tensor, "*batch n"]:
    """T⁻¹(Q(T(x))): what becomes of an activation."""
    if map is None:
        return fake_quant(x, fmt)
    with evaluated_once(map):
        back: Tensor = map.inverse(fake_quant(map(x), fmt))
    return back
