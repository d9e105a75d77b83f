"""Laws of codes: what is stored comes back, packed or not, and what cannot be stored is refused."""

import dataclasses
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latmix.errors import LatmixError
from latmix.numerics import (
    FORMATS,
    BlockFormat,
    choose_scales,
    decode,
    decode_scales,
    encode,
    encode_scales,
    fake_quant,
    pack,
    quantize_with_scales,
    round_to_element,
    unpack,
)

every_format = pytest.mark.parametrize("fmt", [FORMATS[name] for name in FORMATS], ids=str)


@every_format
def test_codes_decode_and_encode(fmt: BlockFormat) -> None:
    """Every code that means a number comes back, except the one that a symmetric integer leaves unused."""
    values = torch.tensor(fmt.element.values)
    codes = torch.arange(len(values), dtype=torch.uint8)[values.isfinite() & (values.abs() <= fmt.element.max)]
    fmt = dataclasses.replace(fmt, block=len(codes))
    unit = torch.ones(()) if fmt.scale_element == "e4m3" else None
    quantized = encode(values[codes.int()], fmt, scales=torch.ones(1), tensor_scale=unit)
    assert torch.equal(quantized.codes, codes)
    assert torch.equal(decode(quantized), values[codes.int()])


@every_format
def test_given_scales(fmt: BlockFormat) -> None:
    """Scales of another tensor, and of another rule, encode to what `quantize_with_scales` gives."""
    x = torch.randn(3, 2 * fmt.block + 7)
    tensor_scale = torch.tensor(0.03) if fmt.scale_element == "e4m3" else None
    scales = choose_scales(x * 2.3, dataclasses.replace(fmt, scale="search"), tensor_scale=tensor_scale)
    assert torch.equal(decode(encode(x, fmt, scales, tensor_scale)), quantize_with_scales(x, scales, fmt))


@every_format
def test_saturation_under_given_scales(fmt: BlockFormat) -> None:
    x = torch.tensor([torch.inf, -torch.inf, 1e30, -fmt.element.max * 2])
    expected = [fmt.element.max, -fmt.element.max] * 2
    assert quantize_with_scales(x, torch.ones(1), fmt).tolist() == expected
    assert round_to_element(x, fmt.element, fmt.rounding).tolist() == expected


@every_format
def test_scale_bytes_round_trip(fmt: BlockFormat) -> None:
    """Every byte of a scale, NaN included; zero is no scale that a rule chooses, but E4M3 can store it."""
    codes = torch.arange(len(fmt.scale_grid) + 1, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        for tensor_scale in (None, torch.tensor(0.7)) if fmt.scale_element == "e4m3" else (None,):
            scales = decode_scales(codes, fmt, tensor_scale, dtype)
            assert scales.dtype == dtype and scales[-1].isnan() and scales[:-1].isfinite().all()
            assert torch.equal(encode_scales(scales, fmt, tensor_scale), codes)


@settings(deadline=None)
@given(st.sampled_from([4, 6, 8]), st.integers(0, 40), st.integers(0, 3), st.randoms(use_true_random=False))
def test_pack_round_trip(bits: int, n: int, rows: int, random: Random) -> None:
    codes = torch.tensor([random.randrange(2**bits) for _ in range(rows * n)], dtype=torch.uint8).reshape(rows, n)
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, n), codes)
    for row, bytes_ in zip(codes.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(bytes_), "little") == sum(code << (bits * j) for j, code in enumerate(row))


def test_pack_order() -> None:
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0x21, 0x03]
    assert pack(codes, 6).tolist() == [0x81, 0x30, 0x00]
    with pytest.raises(LatmixError, match="4, 6, 8"):
        pack(codes, 5)
    with pytest.raises(LatmixError, match="4, 6, 8"):
        unpack(codes, 3, 3)
    with pytest.raises(LatmixError, match="5 codes of 4 bits take 3 bytes, not 2"):
        unpack(codes[:2], 4, 5)


@every_format
def test_empty_batch(fmt: BlockFormat) -> None:
    if fmt.scale_element == "e8m0":
        assert decode(encode(torch.zeros(0, 40), fmt)).shape == fake_quant(torch.zeros(0, 40), fmt).shape == (0, 40)
        assert decode(encode(torch.zeros(2, 0), fmt)).shape == (2, 0)


def test_what_cannot_be_encoded() -> None:
    x = torch.randn(2, 32)
    with pytest.raises(LatmixError, match="float16"):
        fake_quant(x.half(), "mxfp4")
    with pytest.raises(LatmixError, match="Unknown rounding 'up'; known: even, away"):
        round_to_element(x, FORMATS["mxfp4"].element, "up")
    with pytest.raises(LatmixError, match="powers of two"):
        encode(x, "mxfp4", scales=torch.full((2, 1), 3.0))
    with pytest.raises(LatmixError, match="powers of two"):
        encode(x, "mxfp4", scales=torch.full((2, 1), 2.0**-128))
    with pytest.raises(LatmixError, match="tensor_scale"):
        encode(x, "nvfp4", scales=torch.ones(2, 2))
    with pytest.raises(LatmixError, match="E4M3"):
        encode(x, "nvfp4", scales=torch.full((2, 2), 449.0), tensor_scale=torch.ones(()))
    x[1, 3] = torch.nan
    with pytest.raises(LatmixError, match="NaN"):
        encode(x, "mxfp4", scales=torch.ones(2, 1))
