"""Learned rotations within blocks: an outlier is spread over its own MX block and over no other.

The form of a `Rotation` whose generator is zero outside the blocks. Given up: the structure. It is stored and applied
as a dense matrix, at the cost of one, which keeps a tail shorter than a block from being a case of its own.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from latmix.transforms.base import TRANSFORMS
from latmix.transforms.dense import Dense
from latmix.transforms.initial import initial_matrix
from latmix.transforms.rotation import exponential, orthonormal


class BlockRotation(Dense):
    """A = expm(½ M∘(G − Gᵀ)) A₀, M one inside the diagonal blocks and zero outside; G learned, zero at the start.

    Args:
        initial: A₀, orthogonal (n, n); to stay within blocks it has to be block-diagonal itself.
        block: size of the blocks; the last may be shorter.

    Cost: that of a `Rotation`.
    """

    initial: Tensor
    inside: Bool[Tensor, "n n"]

    def __init__(self, initial: Float[Tensor, "n n"], block: int) -> None:
        super().__init__(initial, orthogonal=True)
        number = torch.arange(self.size) // block
        self.generator = nn.Parameter(torch.zeros_like(initial))
        self.register_buffer("initial", initial.detach().clone())
        self.register_buffer("inside", number[:, None] == number, persistent=False)

    def factors(self) -> tuple[Tensor, ...]:
        return self.generator, self.inside, self.initial

    @staticmethod
    def build(*factors: Tensor) -> tuple[Tensor, Tensor]:
        generator, inside, initial = factors
        matrix = exponential(torch.where(inside, generator - generator.mT, 0) / 2) @ orthonormal(initial)
        return matrix, matrix.mT

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.generator.new_zeros(())


def build_block_rotation(size: int, init: str, block: int, seed: int) -> BlockRotation:
    """Learned: a rotation within each block."""
    return BlockRotation(initial_matrix(init, size, block, seed), block).float()


TRANSFORMS.add("block-rotation", build_block_rotation)
