"""`blocks.cpp` in Triton, for GPUs: the same functions, in one pass over memory, with the bits of the reference.

Exponents and mantissas are read off the bits of a float32, so scales, spacings and codes are integers, and what is left
of floating point is a handful of products by powers of two, each exact or rounded once. Nothing depends on how a GPU
divides or takes logarithms. bfloat16 goes in and out as its bits, too, since Triton's interpreter, by which tests hold
all of this to the reference without a GPU, does not round to it as a GPU does.

A program takes ROWS whole blocks, one above the other in a tile of WIDTH, the power of two that holds one. Given up:
formats whose scales depend on more than a block's largest magnitude (NVFP4, "search").
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
@no_type_check  # here and below: not Python that runs, so nothing to check the types of
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def as_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def power(exponent):
    """2^(exponent - 127), from 0 to 254; -1 is anything."""
    return as_float(tl.where(exponent == 0, 1 << 22, exponent << 23))


@triton.jit
@no_type_check
def places(blocks, BLOCK: constexpr, WIDTH: constexpr, ROWS: constexpr):
    """Rows, columns, offsets of this program's elements, and whether they exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return row, column, row * BLOCK + column, (row < blocks) & (column < BLOCK)


@triton.jit
@no_type_check
def load(x, at, inside):
    """Bits of float32; `x` points to bits of float32 or of bfloat16."""
    bits = tl.load(x + at, inside, 0).to(tl.int32)
    return bits << 16 if x.dtype.element_ty == tl.int16 else bits


@triton.jit
@no_type_check
def store(out, at, bits, inside):
    if out.dtype.element_ty == tl.int16:  # to nearest even, which a NaN, all ones on some GPUs, would not survive
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    tl.store(out + at, bits.to(out.dtype.element_ty), inside)


@triton.jit
@no_type_check
def scale_byte(bits, CARRY: constexpr, MAX: constexpr):
    """E8M0 of each row. Adding CARRY makes exactly the mantissas that take twice the power of two carry into it."""
    top = tl.max(bits & 0x7FFFFFFF, 1)[:, None]
    normal = as_bits(top.to(tl.float32)) - (149 << 23)  # what a subnormal's bits would be, with more exponents
    byte = ((tl.where(top < 1 << 23, normal, top) + CARRY) >> 23) - ((MAX >> 23) - 127)
    return tl.where(top >= 0x7F800000, 255, tl.minimum(tl.maximum(byte, 0), 254))


@triton.jit
@no_type_check
def to_grid(y, MAX: constexpr, LOWEST: constexpr, MANTISSA: constexpr, AWAY: constexpr):
    """The grid's number next to |y| is the first of these times 2^(the second - 127)."""
    m = tl.minimum(as_bits(y) & 0x7FFFFFFF, MAX)
    exponent = tl.maximum(m >> 23, LOWEST) - MANTISSA
    steps = as_float(m) * power(254 - exponent)
    if AWAY:
        return (steps + (0.5 - 2**-25)).to(tl.int32).to(tl.float32), exponent
    return (steps + 2**23) - 2**23, exponent  # where floats are integers


@triton.jit
@no_type_check
def with_sign(m, y, COMPLEMENT: constexpr):
    """Bits of `m`, negative where `y` is; two's complement has no -0."""
    sign = (as_bits(y) >> 31) << 31
    return as_bits(m) | (tl.where(m == 0, 0, sign) if COMPLEMENT else sign)


@triton.jit
@no_type_check
def rotated(v, norm, PASSES: constexpr, WIDTH: constexpr, ROWS: constexpr):
    """Each row by the Hadamard matrix, in the order of additions of `rotate_blocks`."""
    for _ in tl.static_range(PASSES):
        even, odd = tl.split(tl.reshape(v, (ROWS, WIDTH // 2, 2)))
        v = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, WIDTH))
    return v * norm


@triton.jit
@no_type_check
def quantize(
    x, out, blocks, norm, PASSES: constexpr, CARRY: constexpr,
    MAX: constexpr, LOWEST: constexpr, MANTISSA: constexpr, AWAY: constexpr, COMPLEMENT: constexpr,
    BLOCK: constexpr, WIDTH: constexpr, ROWS: constexpr,
):  # fmt: skip
    row, column, at, inside = places(blocks, BLOCK, WIDTH, ROWS)
    bits = load(x, at, inside)
    if PASSES > 0:
        bits = as_bits(rotated(as_float(bits), norm, PASSES, WIDTH, ROWS))
    byte = scale_byte(bits, CARRY, MAX)
    y = as_float(bits) * power(254 - byte)
    steps, exponent = to_grid(y, MAX, LOWEST, MANTISSA, AWAY)
    value = as_float(with_sign(steps * power(exponent), y, COMPLEMENT)) * power(byte)
    store(out, at, tl.where(byte == 255, 0x7FC00000, as_bits(value)), inside)


@triton.jit
@no_type_check
def encode(
    x, given, out, scales, blocks, TOP: constexpr, CARRY: constexpr,
    MAX: constexpr, LOWEST: constexpr, MANTISSA: constexpr, AWAY: constexpr, COMPLEMENT: constexpr,
    BLOCK: constexpr, WIDTH: constexpr, ROWS: constexpr,
):  # fmt: skip
    row, column, at, inside = places(blocks, BLOCK, WIDTH, ROWS)
    bits = load(x, at, inside)
    byte = scale_byte(bits, CARRY, MAX) if given is None else (load(given, row, row < blocks) >> 23) & 255
    steps, exponent = to_grid(as_float(bits) * power(254 - byte), MAX, LOWEST, MANTISSA, AWAY)
    code, negative = steps.to(tl.int32) + ((exponent + MANTISSA - LOWEST) << MANTISSA), bits >> 31
    code = (code ^ negative) - negative if COMPLEMENT else code | (negative & TOP)
    tl.store(out + at, tl.where(byte == 255, 0, code & (2 * TOP - 1)).to(tl.uint8), inside)
    tl.store(scales + row, byte.to(tl.uint8), row < blocks)


@triton.jit
@no_type_check
def pack(pairs, out, count, SIZE: constexpr):
    """`pairs` of bytes, the first in the low one."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    pair = tl.load(pairs + at, at < count, 0)
    tl.store(out + at, (pair | (pair >> 4)).to(tl.uint8), at < count)


@triton.jit
@no_type_check
def scale_gradient(g, x, q, out, blocks, BLOCK: constexpr, WIDTH: constexpr, ROWS: constexpr):
    row, column, at, inside = places(blocks, BLOCK, WIDTH, ROWS)
    gradient, bits = as_float(load(g, at, inside)), load(x, at, inside)
    along = tl.sum(gradient * (as_float(load(q, at, inside)) - as_float(bits)), 1)[:, None]
    size = bits & 0x7FFFFFFF
    peak = tl.max(size, 1)[:, None]
    first = tl.min(tl.where(size == peak, column, BLOCK), 1)[:, None]
    gain = tl.where(peak == 0, 0.0, tl.div_rn(along, as_float(peak)))
    here = gradient + as_float(as_bits(gain) ^ ((bits >> 31) << 31))
    store(out, at, as_bits(tl.where(column == first, here, gradient)), inside)


@triton.jit
@no_type_check
def round_columns(
    weight, wanted, feedback, scales, error, values, rows,
    MAX: constexpr, LOWEST: constexpr, MANTISSA: constexpr, AWAY: constexpr, COMPLEMENT: constexpr,
    COLUMNS: constexpr, WIDTH: constexpr, STRIP: constexpr,
):  # fmt: skip
    """A strip of rows through all columns; their errors stay in registers."""
    at = tl.program_id(0).to(tl.int64) * STRIP + tl.arange(0, STRIP)
    column = tl.arange(0, WIDTH)[:, None]
    inside = at < rows
    errors = tl.zeros((WIDTH, STRIP), tl.float32)
    for c in range(COLUMNS):
        weights = tl.load(feedback + c * COLUMNS + column, column < c, 0.0)
        target = tl.load(wanted + at, inside, 0.0) + tl.sum(weights * errors, 0)
        scale = tl.load(scales + at, inside, 1.0)
        y = tl.div_rn(target, scale)
        steps, exponent = to_grid(y, MAX, LOWEST, MANTISSA, AWAY)
        value = as_float(with_sign(steps * power(exponent), y, COMPLEMENT)) * scale
        here = tl.load(weight + at, inside, 0.0) - value
        errors = tl.where(column == c, here[None, :], errors)
        tl.store(error + at, here, inside)
        tl.store(values + at, value, inside)
        at += rows
