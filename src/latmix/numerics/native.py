"""`blocks.cpp`, compiled when first needed, and how tensors get there and back.

One library for all formats: a format is a struct of constants (`Constants`), so nothing is compiled anew for another
one. Given up: scales that depend on more than a block's largest magnitude (NVFP4, "search").
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from latmix import compiled
from latmix.compiled import library
from latmix.numerics.formats import BlockFormat, Element

NAME = compiled.NAME
SOURCE = Path(__file__).with_name("blocks.cpp")
GRAIN = 1 << 17
"""Elements that one thread works through before another is worth waking, which takes some 30 µs."""
MAPPED = 1 << 25
"""Bytes from which the C library takes memory fresh from the system, however often it was asked before."""


ABOVE = 2.0**-23
CARRIES: dict[str, Callable[[Element], float]] = {
    "floor": lambda element: 2.0,
    "ceil": lambda element: 1 + ABOVE,
    "rceil": lambda element: element.max * 2.0**-element.emax + ABOVE,
    "even": lambda element: 2 - 2.0 ** -(element.mantissa_bits + 1),
}
"""amax / p from which a rule of `latmix.numerics.scales` takes 2p. "More than c" is "from c + 2^-23 on": amax is a
float32, and c has fewer bits."""


def _no_rule(element: Element) -> float:
    """For scales that are given: their rule plays no part."""
    return torch.nan


class Constants(ctypes.Structure):
    """`Format` of `blocks.cpp`."""

    _fields_ = [
        ("block", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("unit", "carry")),
        *((name, ctypes.c_float) for name in ("max", "smallest_normal", "step", "units")),
        *((name, ctypes.c_int32) for name in ("away", "complement", "bits", "shift", "offset")),
    ]


@functools.cache
def constants(fmt: BlockFormat) -> Constants:
    element = fmt.element
    return Constants(
        block=fmt.block,
        unit=2.0**-element.emax,
        carry=CARRIES.get(fmt.scale, _no_rule)(element),
        max=element.max,
        smallest_normal=element.smallest_normal,
        step=2.0**-element.mantissa_bits,
        units=2.0**element.mantissa_bits / element.smallest_normal,
        away=fmt.rounding == "away",
        complement=element.complement,
        bits=element.bits,
        shift=23 - element.mantissa_bits,
        offset=(127 - element.bias) << element.mantissa_bits,
    )


def quantized_values(x: Tensor, fmt: BlockFormat) -> Tensor:
    out = _empty_like(x)
    _call("latmix_values", x, out, fmt=fmt)
    return out


def rotated_values(x: Tensor, fmt: BlockFormat) -> Tensor:
    out = _empty_like(x)
    _call("latmix_rotated_values", x, out, fmt=fmt)
    return out


def codes(x: Tensor, scales: Tensor | None, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes and scale bytes of whole blocks, under given scales (powers of two or NaN) or the format's rule."""
    out, scale_bytes = (torch.empty(shape, dtype=torch.uint8) for shape in (x.shape, x.shape[:-1]))
    given = None if scales is None else scales.float().contiguous()
    _call("latmix_codes", x, given, out, scale_bytes, fmt=fmt)
    return out, scale_bytes


def pack(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two to a byte; rows of an even number of them."""
    out = codes.new_empty(*codes.shape[:-1], codes.shape[-1] // 2)
    threads = min(torch.get_num_threads(), 1 + out.numel() // GRAIN)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, out))
    library(SOURCE).latmix_pack(*pointers, ctypes.c_int64(out.numel()), threads)
    return out


def scale_gradient(gradient: Tensor, x: Tensor, quantized: Tensor, fmt: BlockFormat) -> Tensor:
    out = _empty_like(x)
    _call("latmix_gradient", gradient, x, quantized, out, fmt=fmt)
    return out


def _empty_like(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if out.nbytes >= MAPPED:
        library(SOURCE).latmix_expect_writing(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(out.nbytes))
    return out


def round_columns(
    weight: Tensor, wanted: Tensor, feedback: Tensor, scales: Tensor, error: Tensor, fmt: BlockFormat
) -> bool:
    """In place; True, as a sign that it was done."""
    columns, rows = weight.shape
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (weight, wanted, error, feedback, scales))
    sizes = (ctypes.c_int64(columns), ctypes.c_int64(rows), ctypes.byref(constants(fmt)), torch.get_num_threads())
    library(SOURCE).latmix_columns(*pointers, *sizes)
    return True


def _call(name: str, first: Tensor, *others: Tensor | None, fmt: BlockFormat) -> None:
    """The first tensor, whole blocks, decides about dtype and number of blocks."""
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (first, *others)]
    half, blocks = first.dtype == torch.bfloat16, ctypes.c_int64(first.numel() // fmt.block)
    threads = min(torch.get_num_threads(), 1 + first.numel() // GRAIN)
    getattr(library(SOURCE), name)(ctypes.c_bool(half), *pointers, blocks, ctypes.byref(constants(fmt)), threads)
