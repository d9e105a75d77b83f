"""A Hadamard rotation of each block, and fake quantization of the result, in one pass over memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.compiled import attempt
from latmix.errors import InputError
from latmix.numerics.fakequant import quantized_values
from latmix.numerics.formats import BlockFormat
from latmix.numerics.kernels import by_hand
from latmix.numerics.rounding import widen
from latmix.numerics.scales import from_blocks, to_blocks


@torch.no_grad()
def rotated_fake_quant(x: Float[Tensor, "*batch n"], fmt: BlockFormat) -> Float[Tensor, "*batch n"]:
    """The values of `fake_quant(rotate_blocks(x, fmt.block), fmt)`, bit for bit, in the dtype of `x`. No gradient.

    A bfloat16 `x` is rounded once, after all. Cost: one pass over memory where there is a kernel by hand.

    Raises:
        InputError: blocks that are no power of two, or do not divide n; another dtype than `fake_quant` takes.
    """
    wide = widen(x)
    if fmt.block & (fmt.block - 1) or x.shape[-1] % fmt.block:
        raise InputError(f"No Hadamard matrix for each block of {fmt.block} among {x.shape[-1]} numbers.")
    kernels = by_hand([x], fmt)
    out = attempt(kernels.NAME, kernels.rotated_values, x.contiguous(), fmt) if kernels else None
    if out is not None:
        return out
    return quantized_values(rotate_blocks(wide, fmt.block), fmt).to(x.dtype)


def rotate_blocks(x: Float[Tensor, "*batch n"], block: int) -> Float[Tensor, "*batch n"]:
    """Each block times the normalised Hadamard matrix of Sylvester; `block` a power of two that divides n.

    All passes are the same (Pease 1968): sums of neighbours to the first half, differences to the second. That fixes
    the order of the additions, which a matrix product leaves to its library, so a kernel can have the same bits.
    """
    v = to_blocks(x, block)
    for _ in range(block.bit_length() - 1):
        even, odd = v[..., ::2], v[..., 1::2]
        v = torch.cat([even + odd, even - odd], -1)
    norm = 1 / torch.tensor(float(block), dtype=x.dtype).sqrt()  # rounded as the kernel's is
    return from_blocks(v * norm.to(v.device), x.shape[-1])
