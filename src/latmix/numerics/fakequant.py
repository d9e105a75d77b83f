"""Fake quantization: what a tensor becomes once it has been stored in a block format, in its own dtype.

This is the reference, to which kernels, codes and exports are held bit for bit. It reads as it computes: choose a scale
per block, divide, round to the element's grid, multiply back. Under power-of-two scales every step but the rounding is
exact, and a bfloat16 tensor gives just the float32 result, which bfloat16 holds (at most seven significant bits).

Two gradients. `fake_quant` passes it unchanged (straight-through, Bengio et al. 2013): right for the rounding, but it
takes the error ε = q − x for a constant, though ε grows with the block's scale. A map learned through it is told that
amplifying its output makes the error relatively smaller. `fake_quant_with_scale_gradient` lets the scale follow the
block's largest magnitude, as a scale without the power-of-two steps would: ∂L/∂x gains (Σ g·ε) / x at that one
element. By Euler's theorem this is right on average, for q is homogeneous: q(cx) = c q(x) demands ⟨∂L/∂x, x⟩ = ⟨g, q⟩.
Given up: a gradient at the edges between codes, and a learnable clipping range.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.numerics.formats import BlockFormat, parse_format
from latmix.numerics.kernels import kernel
from latmix.numerics.rounding import round_to_element_, widen
from latmix.numerics.scales import choose_scales, from_blocks, to_blocks


def fake_quant(x: Float[Tensor, "*batch n"], fmt: str | BlockFormat) -> Float[Tensor, "*batch n"]:
    """Quantize and dequantize `x` in blocks along the last dimension; the gradient passes unchanged.

    Args:
        x: bfloat16, float32 or float64; the result has its shape and dtype. A partial last block has its own scale.
        fmt: "mxfp4", "mxint8:block=16,scale=even", ... or a `BlockFormat`.

    Special values: a block that holds NaN or Inf becomes NaN throughout; zero keeps its sign, except in two's
    complement elements. Under a rule that rounds scales up, magnitudes from 1.75 * 2^127 on may round to 2^128, which
    is Inf. NVFP4 takes its tensor scale from all of `x`, so its blocks are not independent, and as its scales are no
    powers of two, its bfloat16 result is the float32 result rounded.
    Cost: about twelve elementwise passes forward, none backward. "search" takes three to seven times as long.

    Raises:
        LatmixError: an unknown format or another dtype.
    """
    quantized: Tensor = _StraightThrough.apply(x, parse_format(fmt))  # type: ignore[no-untyped-call]
    return quantized


def fake_quant_with_scale_gradient(x: Float[Tensor, "*batch n"], fmt: str | BlockFormat) -> Float[Tensor, "*batch n"]:
    """The values of `fake_quant`, with a gradient that knows that the error grows with the scale; for learning maps.

    Cost: two tensors kept for backward, which takes about six elementwise passes.
    """
    quantized: Tensor = _ThroughScale.apply(x, parse_format(fmt))  # type: ignore[no-untyped-call]
    return quantized


@kernel
def quantized_values(x: Float[Tensor, "*batch n"], fmt: BlockFormat) -> Float[Tensor, "*batch n"]:
    """The values of `fake_quant`, without gradient."""
    wide = widen(x)
    return quantize_with_scales(wide, choose_scales(wide, fmt), fmt).to(x.dtype)


@kernel
@torch.no_grad()
def scale_gradient(
    gradient: Float[Tensor, "*batch n"],
    x: Float[Tensor, "*batch n"],
    quantized: Float[Tensor, "*batch n"],
    fmt: BlockFormat,
) -> Float[Tensor, "*batch n"]:
    """`gradient`, plus (Σ g·ε) / x at each block's largest magnitude (the first of several)."""
    blocks, g, q = (to_blocks(widen(tensor), fmt.block) for tensor in (x, gradient, quantized))
    along = (g * (q - blocks)).sum(-1, keepdim=True)
    peak, place = blocks.abs().max(-1, keepdim=True)
    gain = torch.where(peak == 0, torch.zeros_like(peak), along / peak)
    here = torch.arange(fmt.block, device=x.device) == place
    return from_blocks(g + torch.where(here, gain * blocks.sign(), torch.zeros_like(g)), x.shape[-1]).to(gradient.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: BlockFormat) -> Tensor:
        return quantized_values(x, fmt)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ThroughScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fmt: BlockFormat) -> Tensor:
        quantized = quantized_values(x, fmt)
        ctx.save_for_backward(x, quantized)
        ctx.format = fmt
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return scale_gradient(gradient, *ctx.saved_tensors, ctx.format), None


@torch.no_grad()
def quantize_with_scales(
    x: Float[Tensor, "*batch n"], scales: Float[Tensor, "*batch blocks"], fmt: str | BlockFormat
) -> Float[Tensor, "*batch n"]:
    """The nearest values to `x` that the format can express under the given `scales`. No gradient.

    Args:
        scales: one value per block, as `choose_scales` returns them. The rule of the format plays no part.

    Special values: magnitudes beyond the grid saturate, Inf included; NaN stays NaN; a NaN scale makes its block NaN.
    """
    fmt = parse_format(fmt)
    values = scaled_elements(x, scales, fmt)
    values.mul_(scales.to(values.dtype).unsqueeze(-1))
    return from_blocks(values, x.shape[-1]).to(x.dtype)


@torch.no_grad()
def scaled_elements(
    x: Float[Tensor, "*batch n"], scales: Float[Tensor, "*batch blocks"], fmt: BlockFormat
) -> Float[Tensor, "*batch blocks {fmt.block}"]:
    """What stands for `x` under `scales`: numbers of the element's grid, in blocks, in the dtype of the arithmetic."""
    blocks = to_blocks(widen(x), fmt.block)
    return round_to_element_(blocks / scales.to(blocks.dtype).unsqueeze(-1), fmt.element, fmt.rounding)
