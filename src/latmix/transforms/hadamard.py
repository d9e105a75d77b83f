"""Hadamard rotations, fixed: every output is a signed mean of all inputs, so one outlier is shared out evenly.

Sylvester's matrix H₂ₙ = H₂ ⊗ Hₙ exists for powers of two only. A size like 172 = 43 · 4 therefore gets a block-diagonal
map, whose order is the largest power of two that divides it. Given up: the Hadamard matrices of order 12, 20, 172 …,
which other projects carry as tables of a hundred thousand lines; under MX formats the block of 32 is what counts.

The fast transform has radix 64, not 2. A block of 32 is then one matrix product, which is some twenty times faster than
its five butterfly passes (2048 × 2048 float32 on one core: 5.5 ms against 115 ms; a mere copy takes 4.5 ms), because a
butterfly reads and writes all of memory for one addition per number. An order of 2048 = 32 · 64 is two products.
Folding, in float64 and without gradient, goes through butterflies in C++ (`hadamard.cpp`), a block in registers at a
time: a tenth of the products' time, and the same sums on every machine.
"""

import ctypes
import functools
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.compiled import NAME, SMALL, attempt, library
from latmix.errors import InputError
from latmix.transforms.base import TRANSFORMS, Transform
from latmix.transforms.block import Block, Repeat

RADIX = 64
SOURCE, STEP = Path(__file__).with_name("hadamard.cpp"), 32
"""The kernel, and the order that it takes in one pass over memory."""
GRAIN = 1 << 16
"""Elements that a thread works through before another is worth waking."""


class Hadamard(Transform):
    """A = blkdiag(H, …, H) diag(signs), H normalised and symmetric, so A is orthogonal. No parameters.

    Args:
        size: n.
        block: order of the blocks, a power of two; a tail shorter than that is split into its binary powers of two
            (12 → 8 + 4). None: the largest power of two that divides n.
        signs_seed: draws random signs (the randomised Hadamard of QuaRot, arXiv 2404.00456); None: no signs.

    Cost: O(n · 64) per vector for each factor of 64 in the order.

    Raises:
        LatmixError: `block` is not a power of two.
    """

    core: Tensor
    signs: Tensor | None

    def __init__(self, size: int, block: int | None = None, signs_seed: int | None = None) -> None:
        super().__init__(size, orthogonal=True)
        if block is not None and (block < 1 or block & (block - 1)):
            raise InputError(f"Hadamard block {block}: choose a power of two.")
        order = size & -size if block is None else block  # size & -size: the lowest set bit
        tail = size % order
        powers = [1 << bit for bit in reversed(range(tail.bit_length())) if tail >> bit & 1]
        self.segments = [(n, count) for n, count in [(order, size // order)] + [(n, 1) for n in powers] if count]
        # ±1 is exact in every dtype; the norm is applied in the dtype of the activation.
        self.register_buffer("core", sylvester(min(max(n for n, _ in self.segments), RADIX)), persistent=False)
        self.register_buffer("signs", None if signs_seed is None else random_signs(size, signs_seed))

    def only_blocks_of(self, order: int) -> bool:
        """Whether it is one matrix of that order, over and over, and nothing else."""
        return self.signs is None and [n for n, _ in self.segments] == [order]

    @property
    def order(self) -> int:
        return self.segments[0][0] if len(self.segments) == 1 else self.size

    def part(self, some: slice) -> "Hadamard":
        if self.order == self.size:
            return self
        return self.of_this_order(some.stop - some.start, None if self.signs is None else self.signs[some])

    def of_this_order(self, size: int, signs: Tensor | None) -> "Hadamard":
        """Matrices of the same order over so many coordinates."""
        found = Hadamard(size, self.order)
        found.core, found.signs = self.core, signs
        return found

    def _linear(self, x: Tensor) -> Tensor:
        return self._blocks(self._flip(x))

    def _solve(self, y: Tensor) -> Tensor:
        return self._flip(self._blocks(y))

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self._linear(w)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.core.new_zeros(())

    def _flip(self, x: Tensor) -> Tensor:
        return x if self.signs is None else x * self.signs.to(x.dtype)

    def _blocks(self, x: Tensor) -> Tensor:
        pieces = torch.split(x, [order * count for order, count in self.segments], dim=-1)
        orders = [order for order, _ in self.segments]
        done = [self._fast(torch.unflatten(p, -1, (-1, n))).flatten(-2) for p, n in zip(pieces, orders, strict=True)]
        return torch.cat(done, dim=-1) if len(done) > 1 else done[0]

    def _fast(self, x: Tensor) -> Tensor:
        """H x on a whole last dimension: H of order m · r is H_m ⊗ H_r, one product for H_r, recursion for H_m."""
        order = x.shape[-1]
        folding = (
            x.dtype == torch.float64 and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())
        )
        done = attempt(NAME, butterflies, x) if folding and x.numel() >= SMALL else None
        if done is not None:
            return done
        radix = min(order, RADIX)
        h = self.core[:radix, :radix].to(x.dtype) * radix**-0.5  # the corner of a Sylvester matrix is one too
        if order == radix:
            return x.matmul(h)
        y = torch.unflatten(x, -1, (-1, radix)).matmul(h)
        return self._fast(y.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def butterflies(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """H x on the last dimension, in float64. Where the first is the contiguous one (a weight that is turned), so it is
    in the result."""
    turned = x.stride(0) == 1 and not x.is_contiguous()
    source = (x.movedim(0, -1) if turned else x).contiguous()
    out, order, inner = torch.empty_like(source), x.shape[-1], len(x) if turned else 1
    threads = min(torch.get_num_threads(), 1 + out.numel() // GRAIN)
    while True:
        step = min(order, STEP)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, out))
        sizes = map(ctypes.c_int64, (out.numel() // (step * inner), step, inner))
        library(SOURCE).latmix_hadamard(*pointers, *sizes, ctypes.c_double(step**-0.5), threads)
        source, order, inner = out, order // step, inner * step
        if order == 1:
            return out.movedim(-1, 0) if turned else out


def joined(map: Transform) -> Transform:
    """Hadamard matrices of one order by heads as a single map, which cuts nothing up; any other map as it is."""
    inner, repeat, heads = (map.inner, map.repeat, map.heads) if isinstance(map, Repeat) else (map, 1, None)
    if not isinstance(inner, Block) or heads not in (None, len(inner.parts)):
        return map
    parts = [part for part in inner.parts if isinstance(part, Hadamard) and len(part.segments) == 1]
    signs = [part.signs.repeat(repeat) for part in parts if part.signs is not None]
    if len(parts) < len(inner.parts) or len({part.order for part in parts}) > 1 or 0 < len(signs) < len(parts):
        return map
    return parts[0].of_this_order(map.size, torch.cat(signs) if signs else None)


@functools.cache
def sylvester(order: int) -> Float[Tensor, "order order"]:
    """The Hadamard matrix of a power of two, entries ±1, symmetric."""
    matrix = torch.ones(1, 1, device="cpu")  # kept: wherever it is first asked for, it has numbers
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu"), matrix)
    return matrix


def random_signs(size: int, seed: int) -> Float[Tensor, " size"]:
    """±1 with equal chance; the same seed gives the same signs on every device."""
    bits = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return 1.0 - 2.0 * bits


def build_hadamard(size: int, init: str, block: int, seed: int) -> Hadamard:
    """Fixed: the largest Hadamard matrix that the size admits, with random signs."""
    return Hadamard(size, signs_seed=seed)


def build_block_hadamard(size: int, init: str, block: int, seed: int) -> Hadamard:
    """Fixed: a Hadamard matrix in each block."""
    return Hadamard(size, block)


TRANSFORMS.add("hadamard", build_hadamard)
TRANSFORMS.add("block-hadamard", build_block_hadamard)
