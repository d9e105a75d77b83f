"""Exact rounding to an element's grid.

The spacing of the grid at y is a power of two that y's own exponent gives, so rounding is: divide by the spacing, round
to an integer, multiply back. Division by a power of two is exact, and the exponent is read from the bits, never from a
logarithm (log2 of the float just under 8 is 3.0). What is left is one rounding, the intended one.

The passes work in place on one temporary, which in memory-bound eager code is worth a factor of two. Given up: adding
and subtracting 1.5 * 2^23 spacings rounds too, and saves two passes (a quarter of the time of fake_quant), but loses
the sign of zero and knows no "away". Subnormal floats are used as such: do not flush them (torch.set_flush_denormal).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import InputError
from latmix.numerics.formats import Element

_EXPONENT_FIELD = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}


def widen(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The dtype of the arithmetic: bfloat16 becomes float32; float32 and float64 stay.

    Raises:
        LatmixError: any other dtype (float16 cannot hold the range of the scales).
    """
    if x.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"Cannot quantize {x.dtype}; known: float32, bfloat16, float64.")
    return x.float() if x.dtype == torch.bfloat16 else x


def finite(x: Float[Tensor, "*shape"]) -> bool:
    """Whether all of it is, in one pass that writes nothing: extremes of what holds NaN are NaN."""
    return x.numel() == 0 or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def power_of_two_below(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """2^floor(log2|x|), exactly: 0 for zero and for subnormal x, Inf for Inf and NaN. Float32 and float64."""
    integer, mask = _EXPONENT_FIELD[x.dtype]
    return (x.view(integer) & mask).view(x.dtype)


def round_half_away_(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Nearest integer, halves away from zero, in place: trunc(x + h) with h the float just below a half, signed like x.

    With a whole half, 0.5 - 2^-25 would become 1: the sum is rounded. With h, that rounding lifts exactly the halves.
    """
    below_half = x.new_full((), 0.5 - torch.finfo(x.dtype).eps / 4)
    return x.add_(below_half.copysign(x)).trunc_()


_ROUND: dict[str, Callable[[Tensor], Tensor]] = {"even": torch.round_, "away": round_half_away_}


def round_to_element_(x: Float[Tensor, "*shape"], element: Element, rounding: str) -> Float[Tensor, "*shape"]:
    """`round_to_element`, in place on a float32 or float64 `x`."""
    x.clamp_(-element.max, element.max)
    spacing = power_of_two_below(x).clamp_(min=element.smallest_normal).mul_(2.0**-element.mantissa_bits)
    x.div_(spacing)
    x = _ROUND[rounding](x).mul_(spacing)
    return x.add_(0.0) if element.complement else x  # -0 + 0 = +0: two's complement has no -0


@torch.no_grad()
def round_to_element(x: Float[Tensor, "*shape"], element: Element, rounding: str = "even") -> Float[Tensor, "*shape"]:
    """The number of the element's grid nearest to each x, saturating. Exact, and without gradient.

    Args:
        x: in units of the scale; bfloat16, float32 or float64, and the result has the same dtype.
        rounding: "even" or "away", for halves.

    Special values: NaN stays NaN; Inf saturates to the largest finite number; a zero keeps its sign, and a negative
    number that rounds to zero becomes -0, except for two's complement elements, whose only zero is +0.
    Cost: eight elementwise passes and two temporaries.

    Raises:
        LatmixError: an unknown rounding or dtype.
    """
    if rounding not in _ROUND:
        raise InputError(f"Unknown rounding '{rounding}'; known: {', '.join(_ROUND)}.")
    return round_to_element_(widen(x).clone(), element, rounding).to(x.dtype)
