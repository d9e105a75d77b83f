"""No map, no activation and no format violates the bounds of docs/theory.md.

One hundred draws here; the campaign draws ten thousand (tests/conftest.py):

    pytest tests/laws/test_bound.py --hypothesis-profile=campaign
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latmix.analysis import bounds, error, resolution
from latmix.numerics import FORMATS, BlockFormat, choose_scales, fake_quant
from latmix.numerics.scales import to_blocks
from latmix.transforms import TRANSFORMS, Affine, Transform
from tests.laws.test_numerics import ALL

SLACK = 1 + 1e-6  # NVFP4's tensor scale is rounded to float32


def random_map(name: str, size: int, spread: float, shift: float, seed: int) -> Transform:
    """A registered map at random parameters, with a random shift."""
    generator = torch.Generator().manual_seed(seed)
    map = Affine(TRANSFORMS[name](size, "random-rotation", 8, seed)).double()
    for parameter in map.linear_part.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += spread * noise / size**0.5
    map.offset.data = shift * torch.randn(size, generator=generator, dtype=torch.float64)
    return map


def heavy_tailed(tokens: int, size: int, tail: float, magnitude: float, seed: int) -> Tensor:
    """Gaussian at tail 0; the larger the tail, the fewer elements hold all of the energy."""
    x = torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.sign() * x.abs() ** (1 + tail) * 2.0**magnitude


@settings(deadline=None)
@given(
    name=st.sampled_from(list(TRANSFORMS)),
    size=st.integers(1, 72),
    block=st.integers(1, 40),
    fmt=st.sampled_from(ALL),
    spread=st.floats(0, 3),
    shift=st.floats(0, 8),
    tail=st.floats(0, 6),
    magnitude=st.floats(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_nothing_violates_the_bounds(
    name: str,
    size: int,
    block: int,
    fmt: BlockFormat,
    spread: float,
    shift: float,
    tail: float,
    magnitude: float,
    seed: int,
) -> None:
    fmt = dataclasses.replace(fmt, block=block)
    map = random_map(name, size, spread, shift, seed)
    x = heavy_tailed(1 + seed % 3, size, tail, magnitude, seed)
    limit, real = bounds(map, x, fmt), error(map, x, fmt)
    assert real <= limit.simple * SLACK
    assert real <= limit.two_terms * SLACK


@pytest.mark.parametrize("fmt", [fmt for fmt in ALL if fmt.scale != "search"], ids=str)
def test_the_lemmas_hold_and_are_sharp(fmt: BlockFormat) -> None:
    """Every element obeys ρ, and some block comes close to it: the constants are not merely large enough."""
    low, high = resolution(fmt).low, resolution(fmt).high
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, fmt.block, dtype=torch.float64, generator=generator) * 2 - 1
    x *= torch.rand(len(x), 1, dtype=torch.float64, generator=generator).exp2()  # peaks anywhere in an octave
    if fmt.scale_element == "e4m3":
        x *= torch.logspace(-6, 0, len(x), base=10, dtype=torch.float64).unsqueeze(-1)  # subnormal scales too
    peak = x.abs().amax(-1)
    steps = peak / choose_scales(x, fmt).squeeze(-1)
    unclamped = steps >= low * (1 - 1e-12)
    assert unclamped.all() or fmt.scale_element == "e4m3"
    assert (steps <= high * SLACK).all()
    ratio = ((fake_quant(x, fmt) - x).abs().amax(-1) / peak)[unclamped].max()
    assert 0.93 * resolution(fmt).ratio <= ratio <= resolution(fmt).ratio * SLACK


def test_constants_of_mxfp4_by_hand() -> None:
    """Floor: m/s from 4 to 8, worst where 8 saturates to 6. Even: from 3.5 to 7, worst at 5, between 4 and 6."""
    by_rule = {rule: resolution(dataclasses.replace(FORMATS["mxfp4"], scale=rule)) for rule in ("floor", "even")}
    assert (by_rule["floor"].ratio, by_rule["even"].ratio) == (0.25, 0.2)
    assert (by_rule["floor"].relative, by_rule["even"].relative) == (0.25, 0.2)
    assert (by_rule["floor"].absolute, by_rule["even"].absolute) == (1 / 16, 1 / 14)


def test_a_map_that_cheats_is_caught() -> None:
    """The bound without the price of A⁻¹ is violated by a map that shrinks: the test above can fail."""
    x = heavy_tailed(50, 32, 0, 0, 0)
    map = random_map("diagonal", 32, 0, 0, 0)
    map.linear_part.log_scale.data.fill_(-3.0)  # type: ignore[union-attr]
    fmt = FORMATS["mxfp4"]
    peaks = to_blocks(map(x).detach(), fmt.block).abs().amax(-1).square().mean()
    assert error(map, x, fmt) > resolution(fmt).ratio ** 2 * float(peaks)
