"""The best map in closed form, if the quantizer's error is white (docs/theory.md; method of WUSH, arXiv 2512.00956).

Suppose quantizing y adds an error that is white and proportional to the energy of y: E e eᵀ = κ (E‖y‖²/n) I. With C the
covariance of x and μ its mean, y = A(x − μ) loses κ tr(A⁻¹A⁻ᵀ) tr(A C Aᵀ) / n² per element, and

    A = H Λ^−¼ Uᵀ,  v = −A μ,    C = U Λ Uᵀ

is least, at κ (Σ √λ)² / n², against κ tr(E x xᵀ) / n for every rotation without shift. H, a Hadamard matrix, leaves the
loss where it is; it is what makes "white" come true, since it spreads every direction over every element.

Given up: the metric of the readers (`G`), heavy tails, and what a block sees beyond its mean energy. Learning starts
from here and finds those.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.transforms import QR, Affine, Hadamard

SMALLEST = 1e-6
"""Variances below this share of the largest are lifted to it: A stays invertible on directions that are never used."""


@dataclass(frozen=True)
class Optimum:
    """The map, and what the theory promises: its error relative to a rotation's."""

    map: Affine
    ratio: float


@torch.no_grad()
def closed_form(x: Float[Tensor, "tokens n"]) -> Optimum:
    """From activations x. Cost: one eigendecomposition of n × n in float64."""
    wide, n = x.double(), x.shape[-1]
    mean = wide.mean(0)
    covariance = (wide - mean).T @ (wide - mean) / len(x)
    variances, directions = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=SMALLEST * float(variances[-1]))
    hadamard = Hadamard(n).double().to(x.device).matrix()
    a = hadamard @ (variances**-0.25).diag() @ directions.T
    a = a / torch.linalg.svdvals(a).log().mean().exp()  # volume 1: a common factor changes no error
    map = Affine(QR(a).double())
    map.offset = nn.Parameter(-(a @ mean))
    rotation = float(wide.square().sum() / len(x)) / n
    return Optimum(map.float(), float(variances.sqrt().sum() ** 2) / n**2 / rotation)
