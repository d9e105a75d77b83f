"""How large the numbers are before and after a map, and what a map does to RMSNorm."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.numerics import BlockFormat
from latmix.numerics.scales import to_blocks
from latmix.transforms import Transform

EDGES = tuple(2.0 ** (k / 4) for k in range(-24, 21))  # |y| in units of its rms: 2^-6 to 2^5


@dataclass(frozen=True)
class Amplitudes:
    """Of y = T(x).

    Attributes:
        kurtosis: E y⁴ / (E y²)²; 3 for a Gaussian.
        crest: mean over blocks of max² over the mean of y²: what one outlier costs its neighbours.
        histogram: share of |y| / rms in each interval of `EDGES`.
        condition: of A.
        rms_variation: standard deviation over tokens of rms(A x) / rms(x), relative to its mean. An RMSNorm divides by
            the former where it used to divide by the latter, so this is the gain error it makes: 0 for a rotation.
    """

    kurtosis: float
    crest: float
    histogram: tuple[float, ...]
    condition: float
    rms_variation: float


@torch.no_grad()
def amplitudes(map: Transform | None, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Amplitudes:
    """Cost: one SVD of A, a few passes over x."""
    x = x.double()
    y = x if map is None else map(x)
    linear = x if map is None else map.linear(x)
    energy = y.square().mean()
    edges = torch.tensor(EDGES, dtype=torch.float64, device=x.device)
    places = torch.bucketize(y.abs().flatten() / energy.sqrt(), edges)
    counts = torch.bincount(places, minlength=len(EDGES) + 1)[1 : len(EDGES)] / y.numel()
    gain = linear.square().mean(-1).sqrt() / x.square().mean(-1).sqrt()
    return Amplitudes(
        kurtosis=float(y.pow(4).mean() / energy**2),
        crest=float(to_blocks(y, fmt.block).abs().amax(-1).square().mean() / energy),
        histogram=tuple(counts.tolist()),
        condition=1.0 if map is None else map.condition(),
        rms_variation=float(gain.std(correction=0) / gain.mean()),
    )
