"""A Hadamard rotation of each block, and fake quantization of the result, in one pass over memory."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import LatmixError
from latmix.numerics import native
from latmix.numerics.fakequant import quantized_values
from latmix.numerics.formats import BlockFormat
from latmix.numerics.kernels import kernel
from latmix.numerics.rounding import widen
from latmix.numerics.scales import from_blocks, to_blocks


def rotated_fake_quant(x: Float[Tensor, "*batch n"], fmt: BlockFormat) -> Float[Tensor, "*batch n"]:
    """`fake_quant` of `rotate_blocks(x, fmt.block)`, in the dtype of `x`. No gradient.

    Raises:
        LatmixError: blocks that are no power of two, or do not divide n; another dtype than `fake_quant` takes.
    """
    if fmt.block & (fmt.block - 1) or x.shape[-1] % fmt.block:
        raise LatmixError(f"No Hadamard matrix for each block of {fmt.block} among {x.shape[-1]} numbers.")
    return _rotated_values(x, fmt)


@kernel(native.rotated_values)
@torch.no_grad()
def _rotated_values(x: Float[Tensor, "*batch n"], fmt: BlockFormat) -> Float[Tensor, "*batch n"]:
    rotated = rotate_blocks(widen(x), fmt.block)
    return quantized_values.reference(rotated, fmt).to(x.dtype)  # type: ignore[attr-defined]


def rotate_blocks(x: Float[Tensor, "*batch n"], block: int) -> Float[Tensor, "*batch n"]:
    """Each block times the normalised Hadamard matrix of Sylvester, float32 or float64, n a multiple of `block`.

    All passes are the same (Pease 1968): sums of neighbours to the first half, differences to the second. That fixes
    the order of the additions, which a matrix product leaves to its library, so a kernel can have the same bits.
    """
    v = to_blocks(x, block)
    for _ in range(int(math.log2(block))):
        even, odd = v[..., ::2], v[..., 1::2]
        v = torch.cat([even + odd, even - odd], -1)
    norm = 1 / torch.tensor(float(block), dtype=x.dtype).sqrt()  # rounded as the kernel's is
    return from_blocks(v * norm.to(v.device), x.shape[-1])
