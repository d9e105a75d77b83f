"""What rows of a weight make of a few vectors, in float64: `products.cpp`, which reads the rows as they are, or torch,
which copies them to float64 first and takes three times as long. The last bits differ."""

import ctypes
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from latmix.compiled import NAME, SMALL, attempt, library
from latmix.model.tensors import rows

SOURCE, VECTORS = Path(__file__).with_name("products.cpp"), 8
GRAIN = 1 << 16
"""Elements that a thread works through before another is worth waking."""


def products(weight: Float[Tensor, "some n"], x: Float[Tensor, "vectors n"]) -> Float[Tensor, "vectors some"]:
    """x in float64, its numbers side by side in memory (the transpose is contiguous)."""
    native = (len(x), weight.dtype, weight.device.type) == (VECTORS, torch.float32, "cpu") and weight.is_contiguous()
    found = attempt(NAME, _native, weight, x) if native and weight.numel() >= SMALL else None
    return _reference(weight, x) if found is None else found


def _native(weight: Tensor, x: Tensor) -> Tensor:
    out = x.new_empty(len(x), len(weight))
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x.T.contiguous(), out))
    threads = min(torch.get_num_threads(), 1 + weight.numel() // GRAIN)
    library(SOURCE).latmix_products(*pointers, *map(ctypes.c_int64, weight.shape), threads)
    return out


def _reference(weight: Tensor, x: Tensor) -> Tensor:
    # one room for all: small results kept between large pieces would keep the C library from using their room again
    out, at = x.new_empty(len(x), len(weight)), 0
    for piece in rows(weight):
        out[:, at : at + len(piece)] = F.linear(x, piece.double())
        at += len(piece)
    return out
