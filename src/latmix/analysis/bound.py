"""What the error of a map can be at most: two bounds, proved in docs/theory.md.

With y = T(x) = A x + v, m_b the largest magnitude of block b of y and B_b its size, for every x, A and v

    ‖x − T⁻¹(Q(T(x)))‖² ≤ ‖A⁻¹‖₂² Σ_b B_b (ρ² m_b² + f²)                                            (simple)
    ‖x − T⁻¹(Q(T(x)))‖² ≤ ‖A⁻¹‖₂² (ε² ‖y‖² + Σ_b B_b (η² m_b² + f²))                                (two terms)

The first factor is the price of a map that is no rotation, the second is what the block structure sees of the
distribution. ρ, ε and η belong to the format alone: they are read off its grid and off how far its scale rule lets a
block's largest magnitude stand from the scale. f is the error of blocks below the smallest scale: 0 in practice.

Given up: bounds on the mean under a model of the distribution, which would be closer and could be wrong.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import InputError
from latmix.numerics import BlockFormat, choose_tensor_scale
from latmix.numerics.scales import to_blocks
from latmix.transforms import Transform


@dataclass(frozen=True)
class Resolution:
    """How finely a format resolves a block.

    Attributes:
        low, high: bounds on m/s, a block's largest magnitude in units of its scale (unless the scale is clamped).
        ratio: ρ, the largest error of an element relative to its block's largest magnitude.
        relative: ε, the largest error of an element of the normal range relative to itself, saturation included.
        absolute: η, the largest error of an element below the normal range, relative to the block's largest magnitude.
        floor: f in units of the smallest scale.
    """

    low: float
    high: float
    ratio: float
    relative: float
    absolute: float
    floor: float


def resolution(fmt: BlockFormat) -> Resolution:
    """Raises: LatmixError: a scale rule whose span nobody has worked out."""
    element, (low, high) = fmt.element, scale_span(fmt)
    grid = element.grid
    tops = [(below + above) / 2 for below, above in zip(grid, grid[1:], strict=False)]  # where the error peaks
    # error / t grows between grid points and jumps down nowhere but there, so its peaks are at these t
    peaks = [low, high, *(top for top in tops if low <= top <= high)]
    saturated = max(0.0, 1 - element.max / high)
    normal = 1 / (2.0 ** (element.mantissa_bits + 1) + 1)
    return Resolution(
        low,
        high,
        ratio=max(_envelope(t, grid) / t for t in peaks),
        relative=max(normal, saturated),
        absolute=element.smallest / 2 / low,
        floor=_envelope(low, grid),
    )


def scale_span(fmt: BlockFormat) -> tuple[float, float]:
    """Bounds on m/s that the scale rule keeps. Derivations: docs/theory.md, lemma 1.

    "search" has those of the rule it starts from: it is no worse than that rule in the sum over a block.
    """
    element, power = fmt.element, 2.0**fmt.element.emax
    carry = 2 - 2.0 ** -(element.mantissa_bits + 1)
    spans = {
        ("e8m0", "floor"): (power, 2 * power),
        ("e8m0", "ceil"): (power / 2, power),
        ("e8m0", "rceil"): (element.max / 2, element.max),
        ("e8m0", "even"): (carry * power / 2, carry * power),
        ("e8m0", "search"): (power, 2 * power),
        ("e4m3", "nearest"): (element.max / 2, 1.5 * element.max),
        ("e4m3", "search"): (element.max / 2, 1.5 * element.max),
    }
    key = (fmt.scale_element, fmt.scale)
    if key not in spans:
        raise InputError(f"No bound is known for the scale rule '{fmt.scale}' of {fmt}.")
    return spans[key]


def _envelope(t: float, grid: tuple[float, ...]) -> float:
    """The largest rounding error of a number up to t, in units of the scale."""
    error = max(0.0, t - grid[-1])
    for below, above in zip(grid, grid[1:], strict=False):
        if below < t:
            error = max(error, min(t - below, (above - below) / 2))
    return error


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on E(T) = mean ‖x − T⁻¹(Q(T(x)))‖² / d."""

    simple: float
    two_terms: float


@torch.no_grad()
def bounds(map: Transform, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Bounds:
    """Both bounds for these activations, in float64. Cost: one SVD of A, one pass over x.

    Holds while no block exceeds the largest scale (2^127 times the grid's maximum).
    """
    y, limits = map(x.double()), resolution(fmt)
    smallest = fmt.scale_range[0]
    if (tensor_scale := choose_tensor_scale(y, fmt)) is not None:
        smallest *= float(tensor_scale)
    floor = (limits.floor * smallest) ** 2
    sizes = to_blocks(torch.ones_like(y[:1]), fmt.block).sum(-1)  # a partial last block is smaller
    peaks = (to_blocks(y, fmt.block).abs().amax(-1) ** 2 * sizes).sum(-1).mean() / map.size
    energy = (y**2).mean()
    price = float(1 / torch.linalg.svdvals(map.matrix().double())[-1] ** 2)
    return Bounds(
        float(price * (limits.ratio**2 * peaks + floor)),
        float(price * (limits.relative**2 * energy + limits.absolute**2 * peaks + floor)),
    )
