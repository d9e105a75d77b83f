"""Laws of formats and scale rules: names parse back, and each rule is its definition in exact arithmetic."""

import dataclasses
import math
import pickle
from fractions import Fraction

import pytest
import torch

from latmix.errors import LatmixError
from latmix.numerics import ELEMENTS, FORMATS, ROUNDINGS, SCALE_RULES, BlockFormat, Element, choose_scales, parse_format
from latmix.numerics.scales import RULES

every_element = pytest.mark.parametrize("element", [ELEMENTS[name] for name in ELEMENTS], ids=lambda e: e.name)


def floor_log2(x: Fraction) -> int:
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if x >= Fraction(2) ** exponent else exponent - 1


def ceil_log2(x: Fraction) -> int:
    return -floor_log2(1 / x)


def exponent(rule: str, amax: Fraction, element: Element) -> int:
    """The definitions, as published; Python's `round` of a fraction sends halves to even."""
    if rule == "rceil":
        return ceil_log2(amax / Fraction(element.max))
    if rule == "ceil":
        return ceil_log2(amax) - element.emax
    if rule == "even":
        step = Fraction(2) ** (floor_log2(amax) - element.mantissa_bits)
        amax = round(amax / step) * step
    return floor_log2(amax) - element.emax


def critical_magnitudes(element: Element, dtype: torch.dtype) -> list[float]:
    """Where a rule may change its mind, and the floats beside it, from the smallest subnormal to the largest float."""
    lead = 2.0**-element.emax
    marks = [1.0, 1.5, element.max * lead, 2 - 2.0 ** -(element.mantissa_bits + 1), 2 - 2.0**-element.mantissa_bits]
    exponents = [-149, -148, -140, *range(-131, -117), -30, -3, 0, 1, 8, 125, 126, 127]
    points = torch.tensor([mark * 2.0**e for mark in marks for e in exponents], dtype=torch.float64).to(dtype)
    above, below = (torch.nextafter(points, torch.full_like(points, limit)) for limit in (math.inf, 0.0))
    amax = torch.cat([points, above, below])
    return [x for x in amax.tolist() if x > 0 and math.isfinite(x)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", [rule for rule in SCALE_RULES["e8m0"] if rule != "search"])
@every_element
def test_rules_are_their_definitions(element: Element, rule: str, dtype: torch.dtype) -> None:
    amax = critical_magnitudes(element, dtype)
    fmt = BlockFormat("test", element, block=1, scale=rule)
    scales = choose_scales(torch.tensor(amax, dtype=dtype), fmt).tolist()
    expected = [min(max(exponent(rule, Fraction(x), element), -127), 127) for x in amax]
    assert scales == [2.0**e for e in expected]


def test_even_is_the_bit_trick_of_other_engines() -> None:
    """AMD Quark, vLLM, compressed-tensors, torchao: add half of the mantissa's last place to the bits, then mask."""
    amax = torch.tensor([x for x in critical_magnitudes(ELEMENTS["e2m1"], torch.float32) if 2.0**-120 < x < 2.0**127])
    masked = (amax.view(torch.int32) + (1 << 21)) & 0x7F80_0000
    assert torch.equal(choose_scales(amax, "mxfp4:block=1,scale=even"), masked.view(torch.float32) / 4)


def test_every_rule_is_defined() -> None:
    assert set(RULES) | {"search"} == {rule for rules in SCALE_RULES.values() for rule in rules}


@every_element
def test_element_properties(element: Element) -> None:
    grid, finite = element.grid, [value for value in element.values if math.isfinite(value)]
    assert len(element.values) == 2**element.bits
    assert list(grid) == sorted(set(grid)) and grid[:2] == (0, element.smallest) and grid[-1] == element.max
    assert 2.0**element.emax <= element.max < 2.0 ** (element.emax + 1)
    assert set(finite) - {-2.0} == {sign * value for value in grid for sign in (1, -1)} - {-2.0}
    assert pickle.loads(pickle.dumps(element)) == element


@pytest.mark.parametrize("name", FORMATS.names())
def test_names_parse_back(name: str) -> None:
    assert str(parse_format(name)) == name
    default = FORMATS[name]
    for rule in SCALE_RULES[default.scale_element]:
        for rounding in ROUNDINGS:
            for block in (1, 16, 32, 100):
                fmt = dataclasses.replace(default, block=block, scale=rule, rounding=rounding)
                assert parse_format(str(fmt)) == fmt
                assert fmt.bits_per_element == default.element.bits + 8 / block


def test_canonical_names() -> None:
    assert str(parse_format(" mxfp4:scale=even,block=16 ")) == "mxfp4:block=16,scale=even"
    assert str(parse_format("mxfp4:scale=floor,block=32,rounding=even")) == "mxfp4"
    assert FORMATS["mxfp4"].bits_per_element == 4.25 and FORMATS["nvfp4"].bits_per_element == 4.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mxfp5", "Unknown format 'mxfp5'; known: mxfp4, mxfp6_e2m3"),
        ("mxfp4:group=32", "unknown property 'group'; known: block, scale, rounding"),
        ("mxfp4:scale=log", "unknown scale 'log'; known: floor, ceil, rceil, even, search"),
        ("nvfp4:scale=even", "unknown scale 'even'; known: nearest, search"),
        ("mxfp4:rounding=up", "unknown rounding 'up'; known: even, away"),
        ("mxfp4:block=0", "positive integer"),
        ("mxfp4:block=-4", "positive integer"),
        ("mxfp4:block=1.5", "positive integer"),
        ("mxfp4:tensor_scale=1", "has no tensor_scale"),
        ("nvfp4:tensor_scale=0.3", "tensor_scale is 0.3; it must be a power of two"),
        ("nvfp4:tensor_scale=inf", "it must be a power of two"),
        ("nvfp4:tensor_scale=-1", "it must be a power of two"),
        ("nvfp4:tensor_scale=auto", "tensor_scale is 'auto'; it must be a power of two"),
        ("mxfp4:block", "write name:key=value"),
        ("", "Unknown format ''"),
    ],
)
def test_bad_names(text: str, message: str) -> None:
    with pytest.raises(LatmixError, match=message):
        parse_format(text)


def test_bad_values() -> None:
    with pytest.raises(LatmixError, match="unknown scale_element 'e5m3'; known: e8m0, e4m3"):
        BlockFormat("mine", ELEMENTS["e2m1"], scale_element="e5m3")
