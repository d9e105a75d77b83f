"""Invertible affine maps of activations: the building blocks (see `base`), their registry, and where they start."""

from latmix.transforms.affine import Affine
from latmix.transforms.base import TRANSFORMS, Transform
from latmix.transforms.block import Block, Repeat
from latmix.transforms.block_rotation import BlockRotation
from latmix.transforms.compose import Compose
from latmix.transforms.dense import evaluated_once
from latmix.transforms.diagonal import Diagonal
from latmix.transforms.hadamard import Hadamard
from latmix.transforms.initial import INITIALS, initial_matrix
from latmix.transforms.kronecker import Kronecker
from latmix.transforms.lu import LU
from latmix.transforms.qr import QR
from latmix.transforms.rotation import Rotation
from latmix.transforms.scaled import build_scaled_kronecker, build_scaled_rotation
from latmix.transforms.wush import Wush

__all__ = [
    "INITIALS",
    "LU",
    "QR",
    "TRANSFORMS",
    "Affine",
    "Block",
    "BlockRotation",
    "Compose",
    "Diagonal",
    "Hadamard",
    "Kronecker",
    "Repeat",
    "Rotation",
    "Transform",
    "Wush",
    "build_scaled_kronecker",
    "build_scaled_rotation",
    "evaluated_once",
    "initial_matrix",
]
