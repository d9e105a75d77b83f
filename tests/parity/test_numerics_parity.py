"""Codes and scale bytes, bit for bit, against implementations that share nothing with this one (gfloat, ml_dtypes,
torchao) and a table of facts. (Under a power-of-two scale a wrong bias changes no value: hence codes, not values.)"""

import csv
import dataclasses
import json
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from latmix.numerics import (
    ELEMENTS,
    FORMATS,
    Element,
    decode_scales,
    encode,
    encode_scales,
    pack,
    parse_format,
    round_to_element,
)

gfloat = pytest.importorskip("gfloat", reason="gfloat is not installed")
gfloat_formats = pytest.importorskip("gfloat.formats", reason="gfloat is not installed")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
GFLOAT = {name: getattr(gfloat_formats, f"format_info_ocp_{name}") for name in (*ML_DTYPES, "int8")}
GFLOAT["int4"] = dataclasses.replace(GFLOAT["int8"], name="int4", k=4, precision=4)
MODES = {"even": gfloat.RoundMode.TiesToEven, "away": gfloat.RoundMode.TiesToAway}
every_float = pytest.mark.parametrize("element", [ELEMENTS[name] for name in ML_DTYPES], ids=lambda e: e.name)
every_element = pytest.mark.parametrize("element", [ELEMENTS[name] for name in ELEMENTS], ids=lambda e: e.name)


def codes_of(x: Tensor, element: Element, rounding: str = "even") -> np.ndarray:
    """The codes of `x` under scale 1."""
    fmt = next(FORMATS[name] for name in FORMATS if FORMATS[name].element == element)
    fmt = dataclasses.replace(fmt, block=max(1, len(x)), rounding=rounding)
    return encode(x, fmt, scales=torch.ones(1)).codes.numpy()


def critical_numbers(element: Element) -> Tensor:
    """Every number of the grid, every midpoint, the floats beside them, what saturates, and random ones; both signs."""
    grid = torch.tensor(element.grid)
    points = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, grid[-1:] * torch.tensor([1.01, 1.06, 1.2, 7, 1e20])])
    limits = (torch.full_like(points, torch.inf), torch.zeros_like(points))
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(2000, generator=generator) * (torch.randn(2000, generator=generator) * 5).exp2()
    points = torch.cat([points, *(torch.nextafter(points, limit) for limit in limits), random.abs()])
    return torch.cat([points, -points])


@every_float
def test_rounding_table(element: Element, shared: Path) -> None:
    table = (shared / "mx-reference" / "round_ties_even_saturate.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(table) if row["format"] == element.name]
    x = torch.tensor([float.fromhex(row["x_float32_hex"]) for row in rows])
    assert round_to_element(x, element).tolist() == [float(row["rounded"]) for row in rows]
    assert codes_of(x, element).tolist() == [int(row["code"]) for row in rows]


@every_float
def test_element_codes_of_ml_dtypes(element: Element) -> None:
    x = critical_numbers(element)
    saturated = x.clamp(-element.max, element.max).numpy()
    np.testing.assert_array_equal(codes_of(x, element), saturated.astype(ML_DTYPES[element.name]).view(np.uint8))


@pytest.mark.parametrize("rounding", MODES)
@every_element
def test_element_codes_of_gfloat(element: Element, rounding: str) -> None:
    x = critical_numbers(element).clamp(-element.max, element.max)  # gfloat's integers would use the unused code
    info = GFLOAT[element.name]
    rounded = gfloat.round_ndarray(info, x.double().numpy(), MODES[rounding], sat=True)
    np.testing.assert_array_equal(codes_of(x, element, rounding), gfloat.encode_ndarray(info, rounded))


@every_element
def test_element_values_of_gfloat(element: Element) -> None:
    codes = np.arange(2**element.bits, dtype=np.uint64)
    np.testing.assert_array_equal(np.array(element.values), gfloat.decode_ndarray(GFLOAT[element.name], codes))


def test_scale_bytes_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_scales(torch.from_numpy(codes), "mxfp4").numpy(), values)
    np.testing.assert_array_equal(encode_scales(torch.from_numpy(values), "mxfp4").numpy(), codes)
    unsigned = codes[:128]
    values = unsigned.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(decode_scales(torch.from_numpy(unsigned), "nvfp4").numpy(), values)
    np.testing.assert_array_equal(encode_scales(torch.from_numpy(values), "nvfp4").numpy(), unsigned)


PINNED = json.loads((Path(__file__).parents[1] / "golden" / "codes.json").read_text())


@pytest.mark.parametrize("name", PINNED["formats"])
def test_pinned_codes_of_gfloat(name: str) -> None:
    """The golden codes follow from the golden scale bytes, which torchao and the laws of the rules confirm."""
    fmt, pinned = parse_format(name), PINNED["formats"][name]
    info = gfloat_formats.format_info_ocp_e8m0 if fmt.scale_element == "e8m0" else GFLOAT[fmt.scale_element]
    scales = gfloat.decode_ndarray(info, np.frombuffer(bytes.fromhex(pinned["scales"]), np.uint8).astype(np.uint64))
    if fmt.scale_element == "e4m3":
        scales = (scales * float.fromhex(pinned["tensor_scale"])).astype(np.float32)
    x = np.array([float.fromhex(number) for number in PINNED["input"]], np.float32)
    elements = np.clip(x / scales.repeat(fmt.block)[: len(x)], -fmt.element.max, fmt.element.max)
    info = GFLOAT[fmt.element.name]
    codes = gfloat.encode_ndarray(info, gfloat.round_ndarray(info, elements, MODES[fmt.rounding], sat=True))
    assert bytes(codes.tolist()).hex() == pinned["codes"]


@pytest.fixture(scope="module")
def torchao() -> types.SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
        nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason="torchao is not installed")
    return types.SimpleNamespace(mx=mx, nv=nv)


def rows_of_many_magnitudes() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) * (torch.randn(300, 1, generator=generator) * 10).exp2()
    x[0], x[1] = 0.0, -0.0
    return x


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_codes_and_scale_bytes_of_torchao(name: str, rule: str, torchao: types.SimpleNamespace) -> None:
    """Ordinary magnitudes: torchao takes rceil's logarithm in floats, Inf for a number, and 2^-127 for 2^-126."""
    x = rows_of_many_magnitudes()
    elements = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6_e2m3": torchao.mx.DTYPE_FP6_E2M3,
        "mxfp6_e3m2": torchao.mx.DTYPE_FP6_E3M2,
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
    }
    mode = torchao.mx.ScaleCalculationMode[rule.upper()]
    scales, codes = torchao.mx.to_mx(x, elements[name], 32, mode)
    quantized = encode(x, f"{name}:scale={rule}")
    assert torch.equal(quantized.scales, scales.view(torch.uint8))
    ours = pack(quantized.codes, 4) if name == "mxfp4" else quantized.codes
    assert torch.equal(ours, codes.view(torch.uint8))


def test_nvfp4_of_torchao(torchao: types.SimpleNamespace) -> None:
    """Scale bytes bit for bit; codes but for ties, which torchao's multiplication by a rounded reciprocal may miss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=generator) * torch.randn(300, 1, generator=generator).exp2()
    quantized = encode(x, "nvfp4")
    tensor_scale = torchao.nv.per_tensor_amax_to_scale(x.abs().amax())
    assert torch.equal(quantized.tensor_scale, tensor_scale)
    scales, codes = torchao.nv.nvfp4_quantize(x, per_tensor_scale=tensor_scale)
    normal = quantized.scales >= 8  # torchao keeps scales from being subnormal
    assert normal.float().mean() > 0.9
    assert torch.equal(quantized.scales[normal], scales.view(torch.uint8)[normal])
    ours = pack(quantized.codes, 4).unflatten(-1, (-1, 8))[normal]
    theirs = codes.view(torch.uint8).unflatten(-1, (-1, 8))[normal]
    assert (ours != theirs).float().mean() < 1e-3
