"""A quantized weight that can still move: what its codes and scales look like while they are tuned.

A code says where on the grid a weight stands, not how near it is to the next number. So every weight gets a *latent*
value in units of its block's scale, whose rounding is the code, and every block a latent exponent, whose rounding
doubles or halves the scale. Latents start where the unrounded weight lies within the cell of its code (AdaRound,
2004.10568): a weight that was rounded reluctantly is the first to change its mind. From the middle of their cells all
would leave in the same step.

A code's latent goes as far as the neighbours on the grid, an exponent as far as one: what GPTQ found is amended, not
learned anew. Given up: NVFP4's scales, which stay, since E4M3 is no grid of powers of two.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix import sharding
from latmix.numerics import BlockFormat, Quantized, decode_scales, encode, neighbours
from latmix.numerics.rounding import round_to_element_
from latmix.numerics.scales import from_blocks, to_blocks

INSIDE = 0.499
"""How much of the way to a neighbour a latent may start: short of the half at which it is rounded there."""


class Latent(nn.Module):
    """Parametrization of a quantized weight by latent values and exponents.

    Registered on the *unrounded* weight, it gives the quantized one. Memory: six times the weight in float32, with its
    gradient and Adam's moments.
    """

    scales: Tensor
    below: Tensor
    here: Tensor
    above: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.format, self.tensor_scale, self.dtype = quantized.format, quantized.tensor_scale, quantized.dtype
        scales = decode_scales(quantized.scales, quantized.format, quantized.tensor_scale)
        self.register_buffer("scales", scales, persistent=False)
        for name, values in zip(("below", "here", "above"), neighbours(quantized), strict=True):
            self.register_buffer(name, self._in_scales(values.float()), persistent=False)

    def part(self, device: torch.device) -> None:
        """Let go of what only the start needs, and keep the limits of the rows alone that this rank will hold, where
        their latents wait."""
        self.below, self.above = (sharding.part(limit).to(device) for limit in (self.below, self.above))
        del self.here

    def right_inverse(self, unrounded: Float[Tensor, "out n"]) -> tuple[Tensor, Tensor]:
        """Latents, at the unrounded weight or where its code's cell is nearest to that; exponents, all zero."""
        low, high = (torch.lerp(self.here, side, INSIDE) for side in (self.below, self.above))
        return self._in_scales(unrounded.float()).clamp(low, high), torch.zeros_like(self.scales)

    def forward(self, latent: Float[Tensor, "out n"], exponents: Float[Tensor, "out blocks"]) -> Float[Tensor, "out n"]:
        moved = self.moved_scales(exponents)
        weight: Tensor = _Round.apply(latent, exponents, self.scales, moved, self.format)  # type: ignore[no-untyped-call]
        return weight

    def moved_scales(self, exponents: Float[Tensor, "out blocks"]) -> Float[Tensor, "out blocks"]:
        """Scales, each moved by a power of two, as far as the format has them."""
        if self.tensor_scale is not None:
            return self.scales
        return (self.scales * exponents.detach().round().exp2()).clamp(*self.format.scale_range)

    @torch.no_grad()
    def clamp_(self, latent: Float[Tensor, "rows n"], exponents: Float[Tensor, "rows blocks"]) -> None:
        """Back to where they may be; the rows of this rank."""
        latent.clamp_(self.below, self.above)
        exponents.clamp_(-1.0, 1.0)

    @torch.no_grad()
    def settled(self, latent: Float[Tensor, "out n"], exponents: Float[Tensor, "out blocks"]) -> Quantized:
        """Codes and scales of the weight that `forward` gives."""
        latent, exponents = latent.to(self.scales.device), exponents.to(self.scales.device)
        scales = self.moved_scales(exponents)
        return encode(self(latent, exponents).to(self.dtype), self.format, scales, self.tensor_scale)

    def _in_scales(self, values: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        block = self.format.block
        return from_blocks(to_blocks(values, block) / self.scales.unsqueeze(-1), values.shape[-1])


class _Round(torch.autograd.Function):
    """Straight through the rounding of latents; an exponent sees by how much its block's values grow with the scale:
    q − y for what is rounded, q for what saturates (LSQ, 1902.08153), y the latent in units of the moved scale."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, exponents: Tensor, scales: Tensor, moved: Tensor, format: BlockFormat
    ) -> Tensor:
        y = to_blocks(latent, format.block) * (scales / moved).unsqueeze(-1)
        q = round_to_element_(y.clone(), format.element, format.rounding)
        ctx.save_for_backward(y, q, scales, moved)
        ctx.format, ctx.n = format, latent.shape[-1]
        return from_blocks(q * moved.unsqueeze(-1), ctx.n)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        y, q, scales, moved = ctx.saved_tensors
        blocks = to_blocks(gradient, ctx.format.block)
        by_scale = None
        if ctx.needs_input_grad[1]:
            growth = q - torch.where(y.abs() <= ctx.format.element.max, y, torch.zeros_like(y))
            by_scale = (blocks * growth).sum(-1) * moved * math.log(2)
        return from_blocks(blocks * scales.unsqueeze(-1), ctx.n), by_scale, None, None, None
