"""Scales: which power of two (or, for NVFP4, which E4M3 number) a block is divided by.

The four classical rules differ in one bit. With p = 2^floor(log2(amax)) of a block's largest magnitude, each takes p or
2p, divided by the 2^emax of the element; they disagree only on how far above p amax must be for 2p. Scales, few as they
are, are computed in float64, where every float32 amax is a normal number, subnormals included: p is exact, nothing
overflows, and one code serves all dtypes.

Special values. An all-zero block has the smallest scale (E8M0 byte 0x00 = 2^-127, E4M3 byte 0x01 = 2^-9). A block that
holds NaN or Inf has the NaN scale (E8M0 byte 0xFF, E4M3 byte 0x7F) and decodes to NaN throughout: FP4, FP6 and integer
elements have no code for either, OCP leaves the choice open, and a loud block is better than a silent number. Exponents
are clamped to [-127, 127]: blocks below use less of the grid, and float64 blocks above saturate. Under a tensor scale
that is fixed, a block whose scale rounds to zero is zero throughout (under the largest scale, E4M3 byte 0x7E).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from latmix.errors import InputError
from latmix.numerics.formats import ELEMENTS, SCALE_RULES, BlockFormat, Element, parse_format
from latmix.numerics.rounding import power_of_two_below, round_to_element, round_to_element_, widen


def floor(amax: Float64[Tensor, "*blocks"], element: Element) -> Float64[Tensor, "*blocks"]:
    """2^(floor(log2(amax)) - emax). The sample conversion of OCP MX v1.0, section 6.3: amax may saturate."""
    return power_of_two_below(amax) * 2.0**-element.emax


def ceil(amax: Float64[Tensor, "*blocks"], element: Element) -> Float64[Tensor, "*blocks"]:
    """2^(ceil(log2(amax)) - emax). CEIL in torchao: nothing saturates, and nothing above 2^emax is used."""
    return floor(amax, element) * (1 + (amax > power_of_two_below(amax)))


def rceil(amax: Float64[Tensor, "*blocks"], element: Element) -> Float64[Tensor, "*blocks"]:
    """2^ceil(log2(amax / max)). RCEIL, NVIDIA (cuBLAS, block scaling): the smallest under which nothing saturates."""
    return floor(amax, element) * (1 + (amax > power_of_two_below(amax) * (element.max * 2.0**-element.emax)))


def even(amax: Float64[Tensor, "*blocks"], element: Element) -> Float64[Tensor, "*blocks"]:
    """`floor` of amax rounded to the element's mantissa width. EVEN in AMD Quark, vLLM, torchao.

    Rounding carries into the exponent from (2 - 2^-(mantissa bits + 1)) p on, for E2M1 from 1.75 p. At that tie half
    up, which is what those engines do on the bits, and half to even agree.
    """
    carry = 2 - 2.0 ** -(element.mantissa_bits + 1)
    return floor(amax, element) * (1 + (amax >= power_of_two_below(amax) * carry))


def nearest(amax: Float64[Tensor, "*blocks"], element: Element) -> Float64[Tensor, "*blocks"]:
    """amax / max, to be rounded to the nearest E4M3: NVIDIA's NVFP4 recipe."""
    return amax / element.max


RULES: dict[str, Callable[[Tensor, Element], Tensor]] = {
    "floor": floor,
    "ceil": ceil,
    "rceil": rceil,
    "even": even,
    "nearest": nearest,
}
"""Scale rule → function of (amax in float64, element). "search" starts from the first rule of its scale element."""

SEARCH_FACTORS = {"e8m0": (2.0, 0.5), "e4m3": (0.75, 0.875, 1.125, 1.25, 1.375, 1.5)}
"""What "search" tries besides the rule's own scale. Doubling an E8M0 scale twice cannot help (twice a float's grid is
part of that grid); halving it clips the largest magnitude, which pays for INT4 and under unequal importance."""


def to_blocks(x: Shaped[Tensor, "*batch n"], block: int) -> Shaped[Tensor, "*batch blocks {block}"]:
    """Cut the last dimension into blocks. A partial last one is filled with zeros, which change no scale, no error."""
    missing = -x.shape[-1] % block
    x = functional.pad(x, (0, missing)) if missing else x
    return torch.unflatten(x, -1, (x.shape[-1] // block, block))


def from_blocks(blocks: Shaped[Tensor, "*batch blocks block"], n: int | torch.SymInt) -> Shaped[Tensor, "*batch _"]:
    """The inverse of `to_blocks` for a last dimension of `n` (a symbol while a kernel is recorded)."""
    return blocks.flatten(-2)[..., :n].contiguous()


@torch.no_grad()
def choose_tensor_scale(x: Float[Tensor, "*batch n"], fmt: str | BlockFormat) -> Float[Tensor, ""] | None:
    """The scale of the whole tensor, float32, which multiplies every block's scale; None for formats that have none.

    The format's own, if it has one. Otherwise amax / (448 * 6), so that the block of the largest magnitude gets the
    largest E4M3 scale (NVIDIA's NVFP4 recipe). Blocks with NaN or Inf do not count. At least 2^-126, so that an
    all-zero tensor has a scale too.
    """
    fmt = parse_format(fmt)
    if fmt.scale_element == "e8m0":
        return None
    if fmt.tensor_scale is not None:
        return torch.full((), fmt.tensor_scale, dtype=torch.float32, device=x.device)
    amax = to_blocks(widen(x), fmt.block).abs().amax(-1).double()
    largest = torch.where(amax.isfinite(), amax, 0.0).flatten().amax()
    float32 = torch.finfo(torch.float32)
    return (largest / (fmt.scale_range[1] * fmt.element.max)).clamp(float32.tiny, float32.max).float()


@torch.no_grad()
def choose_scales(
    x: Float[Tensor, "*batch n"],
    fmt: str | BlockFormat,
    importance: Float[Tensor, " n"] | None = None,
    tensor_scale: Float[Tensor, ""] | None = None,
) -> Float[Tensor, "*batch blocks"]:
    """The scale of each block of `x` under the format's rule, as a value: NVFP4's includes the tensor scale.

    Args:
        importance: non-negative weight of each column's squared error in the "search" rule (for a weight matrix, the
            diagonal of the Hessian); the other rules look at amax only and ignore it.
        tensor_scale: NVFP4's, from `choose_tensor_scale`; by default that of `x`.

    Returns: float64 for float64 `x`, else float32; NaN for a block that holds NaN or Inf.
    Cost: one pass over x; "search" quantizes x three times (seven for NVFP4).
    """
    fmt, x = parse_format(fmt), widen(x)
    if tensor_scale is None:
        tensor_scale = choose_tensor_scale(x, fmt)
    unit = 1.0 if tensor_scale is None else tensor_scale.double()
    blocks = to_blocks(x, fmt.block)
    amax = blocks.abs().amax(-1).double()
    rule = SCALE_RULES[fmt.scale_element][0] if fmt.scale == "search" else fmt.scale
    wanted = RULES[rule](amax / unit, fmt.element)
    scales = _to_scale_grid(wanted, fmt)
    if fmt.tensor_scale is not None:  # engines find such scales at run time, and let them round to zero
        scales = torch.where(wanted <= fmt.scale_range[0] / 2, fmt.scale_range[1], scales)
    if fmt.scale == "search":
        weights = 1.0 if importance is None else to_blocks(importance.to(x.dtype), fmt.block)
        scales = _search(blocks, scales, unit, fmt, weights)
    not_finite = amax - amax  # NaN for Inf and NaN, else 0
    return (scales * unit + not_finite).to(x.dtype)


def _to_scale_grid(scales: Tensor, fmt: BlockFormat) -> Tensor:
    """Into range, and rounded to E4M3 where that is the grid; the E8M0 rules give powers of two."""
    scales = scales.clamp(*fmt.scale_range)
    return scales if fmt.scale_element == "e8m0" else round_to_element(scales, ELEMENTS[fmt.scale_element])


def _search(blocks: Tensor, scales: Tensor, unit: Tensor | float, fmt: BlockFormat, weights: Tensor | float) -> Tensor:
    """The candidate of least weighted squared error; the first, the rule's own scale, wins ties and NaN.

    Errors are taken in units of the rule's scale, which keeps their squares in range whatever the tensor's magnitude.
    """
    rule_scales = (scales * unit).to(blocks.dtype).unsqueeze(-1)
    best, least = scales, torch.full_like(scales, torch.inf)
    for factor in (1.0, *SEARCH_FACTORS[fmt.scale_element]):
        candidates = _to_scale_grid(scales * factor, fmt)
        values = (candidates * unit).to(blocks.dtype).unsqueeze(-1)
        quantized = round_to_element_(blocks / values, fmt.element, fmt.rounding).mul_(values)
        error = quantized.sub_(blocks).div_(rule_scales).square_().mul_(weights).sum(-1)
        best = torch.where(error < least, candidates, best)
        least = torch.where(error < least, error, least)
    return best


def encode_scales(
    scales: Float[Tensor, "*batch blocks"], fmt: str | BlockFormat, tensor_scale: Float[Tensor, ""] | None = None
) -> UInt8[Tensor, "*batch blocks"]:
    """Scale values → bytes: E8M0 exponent + 127, or the E4M3 code; NaN → 0xFF and 0x7F.

    Raises:
        LatmixError: a value that is no scale of the format (under this `tensor_scale`).
    """
    fmt = parse_format(fmt)
    steps = scales.double().contiguous()
    steps = steps if tensor_scale is None else steps / tensor_scale.double()
    if fmt.scale_element == "e4m3":  # the product with the tensor scale was rounded
        steps = round_to_element(steps, ELEMENTS["e4m3"])
    grid = torch.tensor(fmt.scale_grid, dtype=torch.float64, device=scales.device)
    codes = torch.searchsorted(grid, steps).to(torch.uint8)  # NaN sorts behind the grid: the NaN byte
    if not torch.equal(decode_scales(codes, fmt, tensor_scale, scales.dtype).nan_to_num(), scales.nan_to_num()):
        kind = "powers of two from 2^-127 to 2^127" if fmt.scale_element == "e8m0" else "E4M3 times the tensor scale"
        raise InputError(f"Scales off the grid of {fmt}: they must be {kind}.")
    return codes


def decode_scales(
    codes: UInt8[Tensor, "*batch blocks"],
    fmt: str | BlockFormat,
    tensor_scale: Float[Tensor, ""] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch blocks"]:
    """Bytes → scale values in `dtype` (float32 or float64), tensor scale included; bytes above the grid are NaN."""
    grid = parse_format(fmt).scale_grid
    table = torch.tensor(grid + (torch.nan,) * (256 - len(grid)), dtype=torch.float64, device=codes.device)
    steps = table[codes.int()]
    return (steps if tensor_scale is None else steps * tensor_scale.double()).to(dtype)
