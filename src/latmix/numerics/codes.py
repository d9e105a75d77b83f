"""Codes: the stored form of a quantized tensor, and the way back.

Encoding reads a magnitude's code off the bits of its float32; decoding is a table. Codes lie one per byte until `pack`
squeezes them, in the little-endian bit stream that MXFP4 checkpoints use (element 2j in the low nibble of byte j).
`decode(encode(x, f))` equals `fake_quant(x, f)` bit for bit.

Given up: working on packed codes. A weight is encoded once; what runs in a loop is `fake_quant`, which makes no codes.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from latmix.compiled import attempt
from latmix.errors import DamagedError, FailedError, InputError
from latmix.numerics.fakequant import scaled_elements
from latmix.numerics.formats import BlockFormat, Element, parse_format
from latmix.numerics.kernels import by_hand, on_device
from latmix.numerics.scales import (
    choose_scales,
    choose_tensor_scale,
    decode_scales,
    encode_scales,
    from_blocks,
    to_blocks,
)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in a block format. `tensor_scale` is NVFP4's, `dtype` the one that `decode` returns."""

    codes: UInt8[Tensor, "*batch n"]
    scales: UInt8[Tensor, "*batch blocks"]
    tensor_scale: Float[Tensor, ""] | None
    format: BlockFormat
    dtype: torch.dtype

    def to(self, device: torch.device | str) -> "Quantized":
        scale = None if self.tensor_scale is None else self.tensor_scale.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), tensor_scale=scale)


@torch.no_grad()
def encode(
    x: Float[Tensor, "*batch n"],
    fmt: str | BlockFormat,
    scales: Float[Tensor, "*batch blocks"] | None = None,
    tensor_scale: Float[Tensor, ""] | None = None,
) -> Quantized:
    """Quantize `x` to codes, under given scales (values, as `choose_scales` returns them) or the format's own rule.

    Args:
        tensor_scale: NVFP4's; needed with `scales`, and without them by default that of `x`.

    Special values: a block with the NaN scale has codes 0; a negative number that rounds to zero has the code of -0,
    except in two's complement elements; magnitudes beyond the grid have the code of the largest one.

    Raises:
        LatmixError: scales that the format cannot store, or NaN in a block whose scale was given as a number.
    """
    fmt = parse_format(fmt)
    if scales is None:
        coded = _by_kernel(x, fmt, None)
        if coded is not None:
            return Quantized(*coded, None, fmt, x.dtype)
        tensor_scale = choose_tensor_scale(x, fmt) if tensor_scale is None else tensor_scale
        scales = choose_scales(x, fmt, tensor_scale=tensor_scale)
    elif tensor_scale is None and fmt.scale_element != "e8m0":
        raise InputError(f"{fmt} with given scales needs the tensor_scale that they were chosen under.")
    scale_codes = encode_scales(scales, fmt, tensor_scale)
    coded = _by_kernel(x, fmt, scales) if x.sum().isfinite() else None  # NaN is refused below
    if coded is not None:
        return Quantized(coded[0], scale_codes, tensor_scale, fmt, x.dtype)
    elements = scaled_elements(x, scales, fmt)
    if torch.any(elements.amax(-1).isnan() & ~scales.isnan()):
        raise FailedError(f"NaN in a block of {fmt} whose scale was given as a number; a NaN scale marks such a block.")
    codes = from_blocks(_element_codes(elements.nan_to_num_(nan=0.0), fmt.element), x.shape[-1])
    return Quantized(codes, scale_codes, tensor_scale, fmt, x.dtype)


def _by_kernel(x: Tensor, fmt: BlockFormat, scales: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Codes and scale bytes, under given scales or the format's own, where a kernel makes them."""
    kernels = by_hand([x], fmt, scales is not None)
    if kernels is None:
        return None
    coded = attempt(kernels.NAME, kernels.codes, to_blocks(x, fmt.block).contiguous(), scales, fmt)
    return coded and (from_blocks(coded[0], x.shape[-1]), coded[1])


def _element_codes(elements: Tensor, element: Element) -> Tensor:
    """Float32 lays out its bits as an element does, and has more of them: multiplied by the power of two that makes the
    element's smallest normal number float32's own, a magnitude leads with the bits of its code, also when subnormal."""
    elements = elements.float()
    moved = elements.abs() * 2.0 ** (element.bias - 127)
    magnitudes = moved.view(torch.int32) >> (23 - element.mantissa_bits)
    sign = elements.view(torch.int32) >> 31  # 0, or -1: every bit set
    top = 1 << (element.bits - 1)
    codes: Tensor = (magnitudes ^ sign) - sign if element.complement else magnitudes | (sign & top)
    return (codes & (2 * top - 1)).to(torch.uint8)


@torch.no_grad()
def decode(quantized: Quantized) -> Float[Tensor, "*batch n"]:
    """The values that codes and scales stand for, in `quantized.dtype`. All 2^bits codes decode, specials included."""
    return _decode(quantized, torch.tensor(quantized.format.element.values, device=quantized.codes.device))


def _decode(quantized: Quantized, table: Float[Tensor, " codes"]) -> Float[Tensor, "*batch n"]:
    """Values by a table of what each code stands for, times the scale of its block."""
    fmt = quantized.format
    dtype = torch.float64 if quantized.dtype == torch.float64 else torch.float32
    scales = decode_scales(quantized.scales, fmt, quantized.tensor_scale, dtype)
    blocks = to_blocks(table.to(dtype)[quantized.codes.int()], fmt.block) * scales.unsqueeze(-1)
    return from_blocks(blocks, quantized.codes.shape[-1]).to(quantized.dtype)


def neighbours(quantized: Quantized) -> tuple[Float[Tensor, "*batch n"], ...]:
    """The values one step below each stored one, the stored ones, and those one step above, under the same scales.

    At the ends of the grid the neighbour is the value itself. Special codes (NaN, Inf) are not met in weights.
    """
    element = quantized.format.element
    grid = sorted({value for value in element.values if abs(value) <= element.max})  # without NaN, Inf, a second zero
    rank = {value: i for i, value in enumerate(grid)}
    below, above = (
        [grid[min(max(rank.get(v, 0) + step, 0), len(grid) - 1)] for v in element.values] for step in (-1, 1)
    )
    tables = (below, list(element.values), above)  # as they are, -0 included
    return tuple(_decode(quantized, torch.tensor(table, device=quantized.codes.device)) for table in tables)


def pack(codes: UInt8[Tensor, "*batch n"], bits: int) -> UInt8[Tensor, "*batch bytes"]:
    """Codes of 4, 6 or 8 bits as a stream of bits, least significant first: code j takes the bits from j * bits on.

    At 4 bits element 2j is the low nibble of byte j. Each row has ceil(n * bits / 8) bytes; spare bits are 0.

    Raises:
        LatmixError: another width.
    """
    if bits not in (4, 6, 8):
        raise InputError(f"Cannot pack codes of {bits} bits; known: 4, 6, 8.")
    kernels = on_device([codes]) if bits == 4 and codes.shape[-1] % 2 == 0 else None
    packed = attempt(kernels.NAME, kernels.pack, codes.contiguous()) if kernels else None
    if packed is not None:
        return packed
    return _regroup(codes, bits, 8)[..., : math.ceil(codes.shape[-1] * bits / 8)].contiguous()


def unpack(packed: UInt8[Tensor, "*batch bytes"], bits: int, n: int) -> UInt8[Tensor, "*batch {n}"]:
    """The inverse of `pack` for rows of `n` codes.

    Raises:
        LatmixError: another width, or rows of another length than `n` codes take.
    """
    if bits not in (4, 6, 8):
        raise InputError(f"Cannot unpack codes of {bits} bits; known: 4, 6, 8.")
    if packed.shape[-1] != math.ceil(n * bits / 8):
        raise DamagedError(f"{n} codes of {bits} bits take {math.ceil(n * bits / 8)} bytes, not {packed.shape[-1]}.")
    return _regroup(packed, 8, bits)[..., :n].contiguous()


def _regroup(digits: Tensor, width: int, new_width: int) -> Tensor:
    """Rewrite a little-endian stream of `width`-bit digits in digits of `new_width` bits, padded with zeros."""
    word = math.lcm(width, new_width)
    shifts = torch.arange(0, word, width, device=digits.device, dtype=torch.int32)
    new_shifts = torch.arange(0, word, new_width, device=digits.device, dtype=torch.int32)
    words = (to_blocks(digits, word // width).int() << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    new_digits: Tensor = (words >> new_shifts) & ((1 << new_width) - 1)
    return new_digits.to(torch.uint8).flatten(-2)
