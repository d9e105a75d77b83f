"""A quantized weight that can still move: what its codes look like while they are tuned.

A code says where on the grid a weight stands, not how near it is to the next number. So every weight gets a *latent*
value in units of its block's scale, whose rounding is the code. Latents start where the unrounded weight lies within
the cell of its code (AdaRound, 2004.10568): a weight that was rounded reluctantly is the first to change its mind. From
the middle of their cells all would leave in the same step.

A latent goes as far as the neighbours on the grid: what GPTQ found is amended, not learned anew. Given up: scales that
move by powers of two. At a rate that did no harm none ever did (docs/log.md).
"""

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
    """Parametrization of a quantized weight by latent values.

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

    def right_inverse(self, unrounded: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        """Latents, at the unrounded weight or where its code's cell is nearest to that."""
        low, high = (torch.lerp(self.here, side, INSIDE) for side in (self.below, self.above))
        return self._in_scales(unrounded.float()).clamp(low, high)

    def forward(self, latent: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        weight: Tensor = _Round.apply(latent, self.scales, self.format)  # type: ignore[no-untyped-call]
        return weight

    @torch.no_grad()
    def constrain_(self, latent: Float[Tensor, "rows n"], damping: float) -> None:
        """Draw them back to their codes, a share of the way, which changes no code, and to where they may be; the rows
        of this rank."""
        if damping:
            latent.lerp_(from_blocks(_on_grid(latent, self.format), latent.shape[-1]), damping)
        latent.clamp_(self.below, self.above)

    @torch.no_grad()
    def settled(self, latent: Float[Tensor, "out n"]) -> Quantized:
        """Codes and scales of the weight that `forward` gives."""
        weight = self(latent.to(self.scales.device)).to(self.dtype)
        return encode(weight, self.format, self.scales, self.tensor_scale)

    def _in_scales(self, values: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        block = self.format.block
        return from_blocks(to_blocks(values, block) / self.scales.unsqueeze(-1), values.shape[-1])


def _on_grid(latent: Float[Tensor, "rows n"], format: BlockFormat) -> Float[Tensor, "rows blocks b"]:
    """The numbers that latents are rounded to, in units of the scale."""
    return round_to_element_(to_blocks(latent, format.block).clone(), format.element, format.rounding)


class _Round(torch.autograd.Function):
    """Straight through the rounding of latents."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, format: BlockFormat) -> Tensor:
        ctx.save_for_backward(scales)
        ctx.block = format.block
        return from_blocks(_on_grid(latent, format) * scales.unsqueeze(-1), latent.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (scales,) = ctx.saved_tensors
        return from_blocks(to_blocks(gradient, ctx.block) * scales.unsqueeze(-1), gradient.shape[-1]), None, None
