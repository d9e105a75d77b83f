"""Kernels are held to the reference, bit for bit where nothing is summed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from latmix import compiled
from latmix.errors import LatmixError
from latmix.numerics import (
    BlockFormat,
    encode,
    fake_quant,
    kernels,
    native,
    pack,
    parse_format,
    rotate_blocks,
    rotated_fake_quant,
)
from latmix.numerics.fakequant import quantized_values, scale_gradient
from latmix.transforms.hadamard import Hadamard
from tests.laws.test_numerics import MX, same, special

BY_HAND = [fmt for fmt in MX if fmt.scale in native.CARRIES]


def reference(kernel: object, *arguments: object) -> Tensor:
    return kernel.reference(*arguments)  # type: ignore[attr-defined, no-any-return]


def patterns(dtype: torch.dtype) -> Tensor:
    """Every bfloat16, NaN, infinities and subnormals included: in order, so that blocks are of one magnitude, shuffled,
    and with NaN and Inf left out; for float32 with random lower halves as well."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.arange(-(2**15), 2**15).to(torch.int16)
    ordered = torch.cat([upper, upper[torch.randperm(2**16, generator=generator)]]).view(torch.bfloat16)
    finite = ordered.where(ordered.isfinite(), 0.0)
    x = torch.cat([ordered, finite])
    lower = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32)
    wide = x.float()
    return x if dtype == torch.bfloat16 else torch.cat([wide, (wide.view(torch.int32) | lower).view(torch.float32)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", BY_HAND, ids=str)
def test_the_kernel_by_hand_is_bit_equal_on_every_pattern(fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = patterns(dtype)
    for tensor in (x.view(-1, 1 << 11), x[: 1 << 17].view(-1, 1 << 9)[:, :172]):  # partial blocks, not contiguous
        assert kernels.by_hand([tensor], fmt) is native and tensor.numel() >= kernels.SMALL
        assert same(quantized_values(tensor, fmt), reference(quantized_values, tensor, fmt))
    assert "C++" in compiled.status()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 3, 16, 40, 4096])
def test_the_kernel_by_hand_takes_any_block(block: int, dtype: torch.dtype) -> None:
    fmt = parse_format(f"mxfp4:block={block},scale=rceil")
    x = torch.randn(5, 4100, generator=torch.Generator().manual_seed(block)).to(dtype)
    assert same(quantized_values(x, fmt), reference(quantized_values, x, fmt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", BY_HAND, ids=str)
def test_codes_by_hand_are_the_reference_s(
    fmt: BlockFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = patterns(dtype)[: 1 << 16].view(-1, 1 << 9)[:, :172]
    by_hand = encode(x, fmt)
    monkeypatch.setattr(kernels, "on_device", lambda tensors: None)
    expected = encode(x, fmt)
    assert torch.equal(by_hand.codes, expected.codes) and torch.equal(by_hand.scales, expected.scales)
    assert by_hand.dtype == dtype and torch.equal(pack(by_hand.codes, 8), by_hand.codes)
    if fmt.element.bits == 4:
        bits = torch.stack([by_hand.codes[:, ::2], by_hand.codes[:, 1::2]], -1).int() * torch.tensor([1, 16])
        assert torch.equal(pack(by_hand.codes, 4), bits.sum(-1).to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["mxfp4:scale=even", "mxint4:block=16,rounding=away", "mxfp8_e4m3:block=1"])
def test_rotation_and_rounding_in_one_pass_have_the_bits_of_one_after_the_other(text: str, dtype: torch.dtype) -> None:
    fmt = parse_format(text)
    x = patterns(dtype).view(-1, 64)
    assert same(rotated_fake_quant(x, fmt), fake_quant(rotate_blocks(x.float(), fmt.block), fmt).to(dtype))
    with pytest.raises(LatmixError, match="No Hadamard matrix for each block"):
        rotated_fake_quant(x[:, :40], parse_format("mxfp4"))


@pytest.mark.parametrize("block", [1, 2, 32, 64])
def test_rotating_blocks_is_the_hadamard_transform(block: int) -> None:
    x = torch.randn(7, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(block))
    torch.testing.assert_close(rotate_blocks(x, block), Hadamard(192, block)(x))


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("mxfp4:scale=even", torch.float32),
        ("nvfp4", torch.bfloat16),
        ("mxfp8_e4m3:block=16,rounding=away", torch.float64),
    ],
)
def test_the_compiled_reference_is_bit_equal_to_the_plain_one(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "on_device", lambda tensors: None)
    fmt = parse_format(text)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 340, 172, generator=generator) * 2.0 ** torch.randint(
        -140, 127, (3, 340, 1), generator=generator
    )
    x[0, 0, :6] = torch.tensor([0.0, -0.0, 2.0**-149, 3.4e38, -3.4e38, 1.75])
    x[0, 1], x[0, 2, 5], x[0, 3, 40] = 0.0, torch.nan, -torch.inf
    if fmt.scale_element == "e4m3":
        x = x.nan_to_num(0.0, 0.0, 0.0).clamp(-1e30, 1e30)
    x = x.to(dtype)
    assert x.numel() >= kernels.LARGE
    assert same(quantized_values(x, fmt), reference(quantized_values, x, fmt))
    assert "torch.compile" in compiled.status() and ";" not in compiled.status()


@pytest.mark.parametrize(("by_hand", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)])
def test_the_gradient_kernels_differ_from_their_reference_by_the_order_of_a_sum(
    by_hand: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_hand:
        monkeypatch.setattr(kernels, "on_device", lambda tensors: None)
    fmt = parse_format("mxfp4:scale=even")
    x, g = torch.randn(2, 700, 172, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[:, 3] = x[:, 5] = 2.5  # several of the largest magnitude: the first counts
    x[0], x[1, :32] = 0.0, -0.0
    q = fake_quant(x, fmt)
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(scale_gradient(g, x, q, fmt), reference(scale_gradient, g, x, q, fmt), **tolerance)


def test_without_a_compiler_the_reference_computes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> None:
        raise FileNotFoundError("No such file or directory: 'c++'")

    monkeypatch.setattr(native, "library", missing)
    monkeypatch.setattr(compiled, "_failures", {})
    x, fmt = torch.randn(128, 64), parse_format("mxfp4:scale=floor")
    with pytest.warns(UserWarning, match="No kernels by C"):
        assert same(quantized_values(x, fmt), reference(quantized_values, x, fmt))
    assert "no C++: No such file" in compiled.status()
    assert same(quantized_values(special(fmt), fmt), reference(quantized_values, special(fmt), fmt))
