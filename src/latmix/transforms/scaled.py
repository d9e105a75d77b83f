"""Learned scales before another learned map: quiet channels are raised to the loud ones' level, then all are mixed.

OSTQuant (arXiv 2501.13987) pairs a diagonal with a rotation, FlatQuant (arXiv 2410.09426) one with a Kronecker product.
"""

import torch

from latmix.transforms.base import TRANSFORMS
from latmix.transforms.compose import Compose
from latmix.transforms.diagonal import Diagonal
from latmix.transforms.kronecker import build_kronecker
from latmix.transforms.rotation import build_rotation


def build_scaled_rotation(size: int, init: str, block: int, seed: int) -> Compose:
    """Learned: one scale per coordinate, then a rotation."""
    return Compose([Diagonal(torch.ones(size)), build_rotation(size, init, block, seed)])


def build_scaled_kronecker(size: int, init: str, block: int, seed: int) -> Compose:
    """Learned: one scale per coordinate, then the Kronecker product of two LU maps."""
    return Compose([Diagonal(torch.ones(size)), build_kronecker(size, init, block, seed)])


TRANSFORMS.add("scaled-rotation", build_scaled_rotation)
TRANSFORMS.add("scaled-kronecker", build_scaled_kronecker)
