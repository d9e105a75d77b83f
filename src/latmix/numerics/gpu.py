"""`blocks_triton`, started on GPUs: what `native` is for `blocks.cpp`, by the same names.

Triton compiles a kernel when it first meets a format and dtype, in about a second, and keeps it on disk. Contracting
products and sums is switched off, since the reference's are not. Given up: tuning of `TILE` and of warps, for which
there was no GPU to measure on.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from latmix.numerics import blocks_triton
from latmix.numerics.formats import BlockFormat
from latmix.numerics.native import CARRIES

NAME = "Triton"
TILE = 2048
"""Elements that a program of four warps takes."""


def quantized_values(x: Tensor, fmt: BlockFormat) -> Tensor:
    return _values(x, fmt, passes=0)


def rotated_values(x: Tensor, fmt: BlockFormat) -> Tensor:
    return _values(x, fmt, passes=fmt.block.bit_length() - 1)


def _values(x: Tensor, fmt: BlockFormat, passes: int) -> Tensor:
    out, norm = torch.empty_like(x), (1 / torch.tensor(float(fmt.block)).sqrt()).item()
    _over_blocks(blocks_triton.quantize, fmt, x, out, norm=norm, PASSES=passes, CARRY=_carry(fmt), **_element(fmt))
    return out


def codes(x: Tensor, scales: Tensor | None, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes and scale bytes of whole blocks, under given scales (powers of two or NaN) or the format's rule."""
    out, scale_bytes = (x.new_empty(shape, dtype=torch.uint8) for shape in (x.shape, x.shape[:-1]))
    given = None if scales is None else scales.float().contiguous()
    constants = _element(fmt) | {"CARRY": 0 if given is not None else _carry(fmt), "TOP": 1 << (fmt.element.bits - 1)}
    _over_blocks(blocks_triton.encode, fmt, x, given, out, scale_bytes, **constants)
    return out, scale_bytes


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two to a byte; rows of an even number of them."""
    out = codes.new_empty(*codes.shape[:-1], codes.shape[-1] // 2)
    _run(blocks_triton.pack, triton.cdiv(out.numel(), TILE), codes.view(torch.int16), out, out.numel(), SIZE=TILE)
    return out


def scale_gradient(gradient: Tensor, x: Tensor, quantized: Tensor, fmt: BlockFormat) -> Tensor:
    out = torch.empty_like(gradient)
    _over_blocks(blocks_triton.scale_gradient, fmt, gradient, x, quantized, out)
    return out


def round_columns(
    weight: Tensor, wanted: Tensor, feedback: Tensor, scales: Tensor, error: Tensor, fmt: BlockFormat
) -> bool:
    """In place; True, as a sign that it was done."""
    (columns, rows), values = weight.shape, torch.empty_like(weight)  # apart: threads share what they read
    width = triton.next_power_of_2(columns)
    strip = max(1, 2 * TILE // width)
    constants = _element(fmt) | {"COLUMNS": columns, "WIDTH": width, "STRIP": strip}
    arguments = (weight, wanted, feedback, scales, error, values, rows)
    _run(blocks_triton.round_columns, triton.cdiv(rows, strip), *arguments, **constants)
    weight.copy_(values)
    return True


def _over_blocks(kernel: Any, fmt: BlockFormat, *tensors: Tensor | None, **constants: Any) -> None:
    """`kernel` over the whole blocks of the first of these tensors, floats as their bits."""
    assert tensors[0] is not None
    blocks, width = tensors[0].numel() // fmt.block, triton.next_power_of_2(fmt.block)
    rows = max(1, TILE // width)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.uint8: torch.uint8}
    given = [None if tensor is None else tensor.view(bits[tensor.dtype]) for tensor in tensors]
    constants |= {"BLOCK": fmt.block, "WIDTH": width, "ROWS": rows}
    _run(kernel, triton.cdiv(blocks, rows), *given, blocks, warps=min(16, max(4, width // 512)), **constants)


def _run(kernel: Any, programs: int, *arguments: Tensor | int | None, warps: int = 4, **constants: Any) -> None:
    """Raises: RuntimeError: Triton cannot compile or start it."""
    try:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
    except TritonError as error:
        raise RuntimeError(str(error)) from error


@functools.cache
def _element(fmt: BlockFormat) -> dict[str, Any]:
    element = fmt.element
    return {
        "MAX": torch.tensor(element.max).view(torch.int32).item(),
        "LOWEST": 128 - element.bias,
        "MANTISSA": element.mantissa_bits,
        "AWAY": fmt.rounding == "away",
        "COMPLEMENT": element.complement,
    }


def _carry(fmt: BlockFormat) -> int:
    return int((2 - CARRIES[fmt.scale](fmt.element)) * 2**23)
