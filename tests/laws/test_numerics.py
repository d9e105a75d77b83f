"""Laws of fake quantization and codes, for every registered format × scale rule × rounding, at random inputs."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latmix.numerics import (
    FORMATS,
    ROUNDINGS,
    SCALE_RULES,
    BlockFormat,
    choose_scales,
    choose_tensor_scale,
    decode,
    decode_scales,
    encode,
    fake_quant,
    fake_quant_with_scale_gradient,
    quantize_with_scales,
)

ALL = [
    dataclasses.replace(FORMATS[name], scale=rule, rounding=rounding)
    for name in FORMATS
    for rule in SCALE_RULES[FORMATS[name].scale_element]
    for rounding in ROUNDINGS
]
MX = [fmt for fmt in ALL if fmt.scale_element == "e8m0"]
every_format = pytest.mark.parametrize("fmt", ALL, ids=str)
every_mx_format = pytest.mark.parametrize("fmt", MX, ids=str)


def wild(fmt: BlockFormat, rows: int = 6, seed: int = 0) -> Tensor:
    """Float32 blocks of very different magnitudes, and rows full of ties; the last block of a row is partial."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * fmt.block + fmt.block // 2 - 3
    x = torch.randn(rows, n, generator=generator) * torch.randint(-30, 30, (rows, n), generator=generator).exp2()
    codes = 2**fmt.element.bits
    ties = torch.randint(1 - codes, codes, (rows, n), generator=generator) * fmt.element.smallest / 2
    return torch.where(torch.rand(rows, 1, generator=generator) < 0.5, x, ties)


def special(fmt: BlockFormat) -> Tensor:
    """`wild` with NaN, infinities, zeros of both signs, subnormals and the largest floats in blocks of their own."""
    x = wild(fmt, rows=7)
    x[0, 1], x[1, -1], x[2, fmt.block] = torch.nan, torch.inf, -torch.inf
    x[3], x[4] = 0.0, -0.0
    x[5] *= 2.0**-149 / x[5].abs().amax() * 1000
    x[6, : fmt.block] *= 3.4e38 / x[6].abs().amax()
    return x


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, whatever the payload of NaN."""
    signs = torch.equal(a.signbit()[~a.isnan()], b.signbit()[~b.isnan()])
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        and signs
    )


@every_format
def test_decode_of_encode_is_fake_quant(fmt: BlockFormat) -> None:
    assert same(decode(encode(wild(fmt), fmt)), fake_quant(wild(fmt), fmt))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = special(fmt).to(dtype)
        assert same(decode(encode(x, fmt)), fake_quant(x, fmt))


@every_format
def test_nearest_number_of_the_grid(fmt: BlockFormat) -> None:
    x = wild(fmt).double()
    scales = choose_scales(x, fmt)
    quantized = quantize_with_scales(x, scales, fmt)
    steps = scales.repeat_interleave(fmt.block, -1)[:, : x.shape[-1]]
    grid = torch.tensor(fmt.element.grid, dtype=torch.float64)
    distances = (x.abs().unsqueeze(-1) - grid * steps.unsqueeze(-1)).abs()
    least, nearest = distances.min(-1)  # the lower of two equally near numbers
    tie = nearest + 1 < len(grid)
    tie &= distances.gather(-1, (nearest + 1).clamp(max=len(grid) - 1).unsqueeze(-1)).squeeze(-1) == least
    upper = nearest + (tie & (nearest % 2 == 1) if fmt.rounding == "even" else tie)
    if fmt.scale_element == "e8m0":  # otherwise x / scale is rounded, and which side of a tie it falls on is not exact
        assert tie.any()
        assert torch.equal(quantized.abs(), grid[upper] * steps)
    torch.testing.assert_close((quantized - x).abs(), least, rtol=1e-14, atol=0)


@every_mx_format
def test_idempotent(fmt: BlockFormat) -> None:
    once = fake_quant(special(fmt), fmt)
    assert same(fake_quant(once[:6], fmt), once[:6])  # the last row overflows


@every_format
def test_scales_with_powers_of_two_and_signs(fmt: BlockFormat) -> None:
    x = wild(fmt)
    quantized = fake_quant(x, fmt)
    for factor in (2.0**-20, 2.0**7, -1.0):
        assert torch.equal(fake_quant(x * factor, fmt), quantized * factor)


@every_format
def test_rows_and_blocks_are_independent(fmt: BlockFormat) -> None:
    x = wild(fmt)
    whole = fake_quant(x, fmt)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert same(fake_quant(x[order], fmt), whole[order])
    assert same(fake_quant(x.reshape(2, 3, -1), fmt), whole.reshape(2, 3, -1))
    tensor_scale = choose_tensor_scale(x, fmt)
    for block, expected in zip(x.split(fmt.block, -1), whole.split(fmt.block, -1), strict=True):
        scales = choose_scales(block, fmt, tensor_scale=tensor_scale)
        assert same(quantize_with_scales(block, scales, fmt), expected)


@every_format
def test_bfloat16_and_float64_agree_with_float32(fmt: BlockFormat) -> None:
    x = torch.cat([wild(fmt), special(fmt)]).bfloat16()
    quantized = fake_quant(x.float(), fmt)
    assert same(fake_quant(x, fmt), quantized.bfloat16())
    if fmt.scale_element == "e8m0":
        assert same(fake_quant(x, fmt).float(), quantized)
        rows = slice(-1 if fmt.scale == "search" else None)  # in float32, the search avoids scales that overflow
        assert same(fake_quant(x[rows].double(), fmt).float(), quantized[rows])


@every_format
def test_gradient_is_the_identity(fmt: BlockFormat) -> None:
    x = wild(fmt).requires_grad_()
    gradient = torch.randn_like(x)
    quantized = fake_quant(x, fmt)
    quantized.backward(gradient)
    assert x.grad is not None and torch.equal(x.grad, gradient)
    assert torch.equal(quantized.detach(), fake_quant(x.detach(), fmt))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fmt", [fmt for fmt in ALL if fmt.scale == "search"], ids=str)
def test_search_is_never_worse(fmt: BlockFormat, weighted: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 2 * fmt.block + 5, dtype=torch.float64) * 1e25
    importance = torch.randn(x.shape[-1]).exp2() if weighted else torch.ones(x.shape[-1])

    def error(rule: str) -> Tensor:
        candidate = dataclasses.replace(fmt, scale=rule)
        difference = quantize_with_scales(x, choose_scales(x, candidate, importance), fmt) - x
        return torch.stack([block.sum(-1) for block in (difference.square() * importance).split(fmt.block, -1)])

    searched = error("search")
    for rule in SCALE_RULES[fmt.scale_element]:
        assert torch.all(searched <= error(rule) * (1 + 1e-12)), rule
    assert searched.sum() < error(SCALE_RULES[fmt.scale_element][0]).sum()


@every_format
def test_scale_gradient_obeys_euler_and_touches_only_the_largest(fmt: BlockFormat) -> None:
    """⟨∂L/∂x, x⟩ = ⟨g, q⟩, what a function with q(cx) = c q(x) demands, in every block; the values are fake_quant's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2 * fmt.block, generator=generator, dtype=torch.float64).requires_grad_()
    gradient = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantized = fake_quant_with_scale_gradient(x, fmt)
    quantized.backward(gradient)
    assert x.grad is not None and torch.equal(quantized, fake_quant(x, fmt))
    blocks = (4, 2, fmt.block)
    sides = [(a * b).detach().view(blocks).sum(-1) for a, b in ((x.grad, x), (gradient, quantized))]
    torch.testing.assert_close(*sides)
    assert ((x.grad != gradient).view(blocks).sum(-1) <= 1).all()


@every_format
def test_special_blocks(fmt: BlockFormat) -> None:
    quantized = encode(torch.stack([torch.zeros(3), -torch.zeros(3), torch.tensor([1, torch.nan, 0])]), fmt)
    negative_zero = 0 if fmt.element.complement else 2 ** (fmt.element.bits - 1)
    assert quantized.codes.tolist() == [[0] * 3, [negative_zero] * 3, [0] * 3]
    assert quantized.scales.flatten().tolist() == ([0, 0, 0xFF] if fmt.scale_element == "e8m0" else [1, 1, 0x7F])
    assert decode(quantized).isnan().all(-1).tolist() == [False, False, True]
    x = special(fmt)
    has_scale = torch.stack([block.isfinite().all(-1) for block in x.split(fmt.block, -1)], -1)
    assert torch.equal(choose_scales(x, fmt).isfinite(), has_scale)


@every_format
def test_float64_beyond_the_scales_saturates(fmt: BlockFormat) -> None:
    largest = 2.0**127 if fmt.scale_element == "e8m0" else 448 * torch.finfo(torch.float32).max
    x = torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64)
    assert fake_quant(x, fmt).tolist() == [fmt.element.max * largest, -fmt.element.max * largest, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ALL),
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(1, 40),
)
def test_any_floats_in_any_block_size(fmt: BlockFormat, numbers: list[float], block: int) -> None:
    fmt = dataclasses.replace(fmt, block=block)
    x = torch.tensor(numbers)
    quantized = encode(x, fmt)
    assert same(decode(quantized), fake_quant(x, fmt))
    scales = decode_scales(quantized.scales, fmt, quantized.tensor_scale)
    assert torch.equal(encode(x, fmt, scales, quantized.tensor_scale).codes, quantized.codes)
    if fmt.scale_element == "e8m0" and fmt.scale != "search":
        assert same(fake_quant(x.double(), fmt).float(), fake_quant(x, fmt))
