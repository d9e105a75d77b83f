"""The maps that an analysis compares: fixed ones, learned ones, and the closed-form optimum.

Learned maps here minimise E(T) at the place itself, which no other term of a model's loss pulls at: they say what a
form of map can win, not what a run will. To add a candidate, write one function here.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.analysis.optimum import closed_form
from latmix.numerics import BlockFormat, fake_quant_with_scale_gradient
from latmix.registry import Registry
from latmix.transforms import QR, Affine, Hadamard, Rotation, Transform, evaluated_once, initial_matrix

STEPS, BATCH, RATE = 300, 256, 1e-2

Candidate = Callable[[Tensor, BlockFormat, int], Transform | None]
"""From activations (tokens, n) to learn from, a format and a seed, to a map; None is the identity."""

CANDIDATES: Registry[Candidate] = Registry("candidate map")


def candidate(make: Candidate) -> Candidate:
    CANDIDATES.add(getattr(make, "__name__", "").replace("_", "-"), make)
    return make


@candidate
def none(x: Tensor, fmt: BlockFormat, seed: int) -> None:
    """No map."""
    return None


@candidate
def hadamard(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """A Hadamard matrix over the whole width (as wide as the width admits), random signs."""
    return Hadamard(x.shape[-1], signs_seed=seed)


@candidate
def random_rotation(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """Uniform over the orthogonal group."""
    return Rotation(initial_matrix("random-rotation", x.shape[-1], seed=seed)).float()


@candidate
def block_hadamard(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """A Hadamard matrix in every block of the format."""
    return Hadamard(x.shape[-1], fmt.block)


@candidate
def learned_rotation(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """A rotation learned from block-Hadamard."""
    return learn(Rotation(_start(x, fmt)).float(), x, fmt, seed)


@candidate
def learned_affine(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """An affine map (QR form, shift) learned from block-Hadamard."""
    return learn(Affine(QR(_start(x, fmt)).float()), x, fmt, seed)


@candidate
def optimum(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """The closed-form optimum under white error, nothing learned."""
    return closed_form(x).map


@candidate
def learned_from_optimum(x: Tensor, fmt: BlockFormat, seed: int) -> Transform:
    """The affine map learned from the closed-form optimum."""
    return learn(closed_form(x).map, x, fmt, seed)


ORTHOGONAL = ("none", "hadamard", "random-rotation", "block-hadamard", "learned-rotation")


def _start(x: Tensor, fmt: BlockFormat) -> Tensor:
    return initial_matrix("block-hadamard", x.shape[-1], fmt.block)


def learn(map: Transform, x: Float[Tensor, "tokens n"], fmt: BlockFormat, seed: int) -> Transform:
    """Minimise E(T) on `x`, in place, by Adam with a linearly falling rate. Returns the map.

    Cost: `STEPS` times one evaluation of the map, forward and backward, and `BATCH` tokens through it.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(map.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        batch = x[torch.randint(len(x), (BATCH,), generator=generator).to(x.device)]
        optimizer.zero_grad()
        with evaluated_once(map):
            loss = (map.inverse(fake_quant_with_scale_gradient(map(batch), fmt)) - batch).square().mean()
            loss.backward()
        optimizer.step()
    return map.requires_grad_(False)


__all__ = ["CANDIDATES", "ORTHOGONAL", "learn"]
