"""Where a learned map starts. The paper starts from a rotation; its Figure 2c suggests a block-diagonal one."""

from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.registry import Registry
from latmix.transforms.hadamard import Hadamard


class Initial(Protocol):
    def __call__(self, size: int, block: int, seed: int) -> Tensor: ...


INITIALS: Registry[Initial] = Registry("initial matrix")


def initial_matrix(name: str, size: int, block: int = 32, seed: int = 0) -> Float[Tensor, "size size"]:
    """The orthogonal matrix called `name`, in float64.

    Args:
        block: block size of "block-hadamard".
        seed: of "random-rotation".

    Raises:
        LatmixError: an unknown name, or a block that is not a power of two.
    """
    return INITIALS[name](size=size, block=block, seed=seed)


def random_rotation(size: int, seed: int) -> Float[Tensor, "size size"]:
    """Uniform over the orthogonal group, reflections included (Mezzadri, math-ph/0609050, section 5), in float64."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(gaussian)
    haar: Tensor = q * r.diagonal().sign()  # without the signs the distribution depends on the QR routine
    return haar


INITIALS.add("block-hadamard", lambda size, block, seed: Hadamard(size, block).double().matrix())
INITIALS.add("hadamard", lambda size, block, seed: Hadamard(size).double().matrix())
INITIALS.add("random-hadamard", lambda size, block, seed: Hadamard(size, signs_seed=seed).double().matrix())
INITIALS.add("identity", lambda size, block, seed: torch.eye(size, dtype=torch.float64))
INITIALS.add("random-rotation", lambda size, block, seed: random_rotation(size, seed))
