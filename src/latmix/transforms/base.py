"""What an invertible affine map is.

A transform changes the basis of an activation: T(x) = A x + v on the last dimension, column vectors. Everything the
rest of the package does with one (apply it online, fold it into the weights, undo it, keep its volume near one) needs
just four maps, and those are what a subclass writes: x → A x, y → A⁻¹y, w → A⁻ᵀw and log|det A|. All three maps act on
the last dimension, so a weight can stand where a batch of vectors stands: for a reader W (out, n) the fold W A⁻¹ is
`transposed_solve(W)`, for a writer W (n, in) the fold A W is `linear(W.T).T`.

Matrices are cast to the dtype of what they are applied to, so one map serves bf16 activations and a float64 fold;
the parameters stay in float32 or float64. `.double()` before a fold makes every law hold to float64 precision.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.errors import InputError
from latmix.registry import Registry

Map = Callable[[Tensor], Tensor]  # on the last dimension


class Transform(nn.Module, ABC):
    """T(x) = A x + v on the last dimension, A invertible.

    Attributes:
        size: n.
        orthogonal: AᵀA = I by construction, whatever the parameters.

    Raises:
        LatmixError: from every map, when the last dimension of its argument is not `size`.
    """

    def __init__(self, size: int, orthogonal: bool) -> None:
        super().__init__()
        if size < 1:
            raise InputError(f"{type(self).__name__} of size {size}: the size must be positive.")
        self.size = size
        self.orthogonal = orthogonal

    @abstractmethod
    def _linear(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _transposed_solve(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def logabsdet(self) -> Float[Tensor, ""]:
        """log|det A|, differentiable. Its square is the volume regulariser (Σ log|s|)² of method.md, section 3."""

    @property
    def shift(self) -> Float[Tensor, " n"] | None:
        """v, or None where it is zero by construction."""
        return None

    @final
    def linear(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """A x, without the shift."""
        return self._linear(self._checked(x))

    @final
    def solve(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """A⁻¹y, without the shift."""
        return self._solve(self._checked(y))

    @final
    def transposed_solve(self, w: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """A⁻ᵀw; for the rows of a reader's weight W (out, n) this is W A⁻¹."""
        return self._transposed_solve(self._checked(w))

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """T(x) = A x + v."""
        y, shift = self.linear(x), self.shift
        return y if shift is None else y + shift.to(y.dtype)

    @final
    def inverse(self, y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """T⁻¹(y) = A⁻¹(y − v)."""
        y, shift = self._checked(y), self.shift
        return self.solve(y if shift is None else y - shift.to(y.dtype))

    @final
    def matrix(self) -> Float[Tensor, "n n"]:
        """A, in the dtype and on the device of the parameters."""
        return self.linear(identity(self.size, self.reference)).T

    @final
    def condition(self) -> float:
        """‖A‖₂‖A⁻¹‖₂ ≥ 1, in float64 and without gradient; 1 where A is orthogonal by construction."""
        if self.orthogonal:
            return 1.0
        values = self.singular_values().detach().double()
        return float(values.max() / values.min())

    def singular_values(self) -> Float[Tensor, " n"]:
        """Of A, in no order, repeated ones perhaps left out. Cost: O(n³), where no subclass knows better."""
        values: Tensor = torch.linalg.svdvals(self.matrix().detach().double())
        return values

    @property
    def reference(self) -> Tensor:
        """One floating tensor of this transform, to ask for dtype and device."""
        return next(t for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())

    @property
    def order(self) -> int:
        """A is block-diagonal in blocks of this size: coordinates of two blocks know nothing of each other."""
        return self.size

    def part(self, some: slice) -> "Transform":
        """What it does to these coordinates, which are whole blocks of its `order`."""
        return self

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise InputError(f"{type(self).__name__} of size {self.size} got a tensor of shape {tuple(x.shape)}.")
        return x


def identity(size: int, like: Tensor) -> Float[Tensor, "size size"]:
    """I, in the dtype and on the device of `like`."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


class Builder(Protocol):
    """Makes a named transform, parameters in float32. Its docstring is the line that `latmix list` shows."""

    def __call__(self, size: int, init: str, block: int, seed: int) -> Transform:
        """
        Args:
            init: name in INITIALS of the matrix where a learned dense map starts; maps without such a choice do not
                use it.
            block: block size of the block-diagonal maps and initial matrices.
            seed: of whatever is random.
        """
        ...


TRANSFORMS: Registry[Builder] = Registry("transform")
