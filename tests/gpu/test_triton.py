"""The kernels in Triton, held to the reference bit for bit: on a GPU, or else in Triton's interpreter, which has to
be asked for before Triton is imported. `tests/laws/test_numerics_triton.py` does so, in a process of its own."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latmix import compiled
from latmix.numerics import (
    BlockFormat,
    choose_scales,
    encode,
    fake_quant,
    kernels,
    pack,
    parse_format,
    rotate_blocks,
    unpack,
)
from latmix.numerics.columns import one_by_one
from latmix.numerics.fakequant import quantized_values, scale_gradient
from tests.golden.test_numerics_golden import PINNED
from tests.laws.test_numerics import same
from tests.laws.test_numerics_kernels import BY_HAND, patterns, reference

gpu = pytest.importorskip("latmix.numerics.gpu", reason="Triton is not installed", exc_type=ImportError)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and not in the interpreter", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
FORMATS = pytest.mark.parametrize("fmt", BY_HAND, ids=str)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes some milliseconds for each, however large."""
    if not GPU:
        monkeypatch.setattr(gpu, "TILE", 1 << 17)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_device", lambda tensors: None)


def blocks(x: Tensor, fmt: BlockFormat) -> Tensor:
    return x.view(-1, fmt.block).to(DEVICE)


@DTYPES
@FORMATS
def test_values_are_the_reference_s_on_every_pattern(fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = blocks(patterns(dtype)[-(1 << 18) : -(1 << 17)], fmt)
    assert same(gpu.quantized_values(x, fmt), reference(quantized_values, x, fmt))


@FORMATS
@pytest.mark.usefixtures("no_kernels")
def test_codes_are_the_reference_s(fmt: BlockFormat) -> None:
    x = blocks(patterns(torch.float32)[5 << 16 : 6 << 16], fmt)  # shuffled; every eighth block holds NaN or Inf
    codes, scales = gpu.codes(x, None, fmt)
    expected = encode(x, fmt)
    assert torch.equal(codes, expected.codes) and torch.equal(scales, expected.scales[:, 0])


@DTYPES
@pytest.mark.parametrize("text", ["mxfp4:scale=search", "mxint4", "mxfp6_e3m2:rounding=away"])
@pytest.mark.usefixtures("no_kernels")
def test_codes_under_given_scales_are_the_reference_s(text: str, dtype: torch.dtype) -> None:
    fmt = parse_format(text)
    x = blocks(patterns(dtype), fmt)
    x[~x.isfinite()] = 0
    scales = choose_scales(x, replace(fmt, scale="ceil")).roll(1, 0)  # of other blocks: some saturate, some vanish
    codes, scale_bytes = gpu.codes(x, scales[:, 0], fmt)
    expected = encode(x, fmt, scales)
    assert torch.equal(codes, expected.codes) and torch.equal(scale_bytes, expected.scales[:, 0])


@DTYPES
@pytest.mark.parametrize("block", [1, 3, 16, 40, 4096])
def test_any_block_in_any_number_of_programs(block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TILE", 512)
    fmt = parse_format(f"mxfp4:block={block},scale=rceil")
    x = torch.randn(4100 // block + 4, block, generator=torch.Generator().manual_seed(block)).to(DEVICE, dtype)
    assert same(gpu.quantized_values(x, fmt), reference(quantized_values, x, fmt))


@DTYPES
@pytest.mark.parametrize("text", ["mxfp4:scale=even", "mxint4:block=16,rounding=away", "mxfp8_e4m3:block=1"])
def test_rotation_and_rounding_in_one_pass_have_the_bits_of_one_after_the_other(text: str, dtype: torch.dtype) -> None:
    fmt = parse_format(text)
    x = blocks(patterns(dtype), fmt)
    expected = reference(quantized_values, rotate_blocks(x.float(), fmt.block), fmt).to(dtype)
    assert same(gpu.rotated_values(x, fmt), expected)


@pytest.mark.parametrize("name", [name for name in PINNED["formats"] if parse_format(name) in BY_HAND])
def test_pinned_codes(name: str) -> None:
    x, fmt = torch.tensor([float.fromhex(number) for number in PINNED["input"]] + 24 * [0.0]), parse_format(name)
    codes, scales = gpu.codes(blocks(x, fmt), None, fmt)
    assert bytes(codes.flatten()[:40].tolist()).hex() == PINNED["formats"][name]["codes"]
    assert bytes(scales.tolist()).hex() == PINNED["formats"][name]["scales"]


def test_packing_is_undone_by_unpacking() -> None:
    codes = torch.randint(16, (3, 5, 340), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.uint8)
    assert torch.equal(unpack(gpu.pack(codes), 4, 340), codes)


@DTYPES
def test_gradients_differ_from_their_reference_by_the_order_of_a_sum(dtype: torch.dtype) -> None:
    fmt = parse_format("mxfp4:scale=even")
    x, g = torch.randn(2, 3000, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    x[:, 3] = x[:, 5] = 2.5  # several of the largest magnitude: the first counts
    x[0], x[1, :32], x[2, 7] = 0.0, -0.0, torch.nan
    q = reference(quantized_values, x, fmt)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(
        gpu.scale_gradient(g, x, q, fmt), reference(scale_gradient, g, x, q, fmt), equal_nan=True, **tolerance
    )


@pytest.mark.parametrize("text", ["mxfp4", "mxint4:rounding=away", "nvfp4"])
def test_a_panel_is_rounded_as_one_column_after_another(text: str) -> None:
    """The same values, but where sums in another order end on two sides of a tie: not seen on these numbers."""
    fmt, columns, out = parse_format(text), 40, 150
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, out, generator=generator).to(DEVICE)
    feedback = torch.randn(columns, columns, generator=generator).to(DEVICE) / 8
    scales = choose_scales(weight.t(), fmt).repeat_interleave(fmt.block, 1)[:, :columns].t().contiguous()
    values, error, expected, expected_error = weight.clone(), weight.clone(), weight.clone(), weight.clone()
    gpu.round_columns(values, weight + 0.1, feedback, scales, error, fmt)
    one_by_one(expected, weight + 0.1, feedback, scales, expected_error, fmt)
    assert torch.equal(values, expected)
    torch.testing.assert_close(error, expected_error)


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_gpu_is_given_these_kernels() -> None:
    fmt, x = parse_format("mxfp4"), torch.randn(128, 172, device="cuda")
    assert kernels.by_hand([x], fmt) is gpu
    assert same(fake_quant(x, fmt).cpu(), fake_quant(x.cpu(), fmt))
    codes = encode(x, fmt).codes
    assert torch.equal(pack(codes, 4).cpu(), pack(codes.cpu(), 4)) and "Triton" in compiled.status()
