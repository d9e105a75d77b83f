"""What an invertible affine map is.

A transform changes the basis of an activation: T(x) = A x + v on the last dimension, column vectors. Everything the
rest of the package does with one (apply it online, fold it into the weights, undo it, keep its volume near one) needs
just four maps, and those are what a subclass writes: x → A x, y → A⁻¹y, w → A⁻ᵀw and log|det A|. All three maps act on
the last dimension, so a weight can stand where a batch of vectors stands: for a reader W (out, n) the fold W A⁻¹ is
`transposed_solve(W)`, for a writer W (n, in) the fold A W is `linear(W.T).T`.

Matrices are cast to the dtype of what they are applied to, so one map serves bf16 activations and a float64 fold;
the parameters stay in float32 or float64. `.double()` before a fold makes every law hold to float64 precision.

Given up: caching by default. A dense map (LU, QR, rotation) rebuilds its matrices at every call, which is slow and
never stale; `evaluated_once` is the one place where they are shared, and it ends where its `with` block ends.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        """‖A‖₂‖A⁻¹‖₂ ≥ 1, in float64 and without gradient. Cost: the singular values of an n × n matrix."""
        singular = torch.linalg.svdvals(self.matrix().detach().double())
        return float(singular[0] / singular[-1])

    @property
    def reference(self) -> Tensor:
        """One floating tensor of this transform, to ask for dtype and device."""
        return next(t for t in chain(self.parameters(), self.buffers()) if t.is_floating_point())

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.size:
            raise InputError(f"{type(self).__name__} of size {self.size} got a tensor of shape {tuple(x.shape)}.")
        return x


def identity(size: int, like: Tensor) -> Float[Tensor, "size size"]:
    """I, in the dtype and on the device of `like`."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


class Dense(Transform):
    """A map whose matrix has no structure left to exploit: every application is one matrix product.

    Cost: outside `evaluated_once` each call builds A and A⁻¹, O(n³), before its O(n²) per vector.
    """

    def __init__(self, initial: Tensor, orthogonal: bool) -> None:
        if initial.ndim != 2 or initial.shape[0] != initial.shape[1]:
            raise InputError(f"{type(self).__name__} starts from a square matrix, got shape {tuple(initial.shape)}.")
        super().__init__(initial.shape[0], orthogonal)
        self._shared: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def _dense(self) -> tuple[Tensor, Tensor]:
        """(A, A⁻¹) from the parameters as they are now."""

    @final
    def matrices(self) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
        """(A, A⁻¹): built anew, or shared inside `evaluated_once`."""
        return self._dense() if self._shared is None else self._shared

    def _linear(self, x: Tensor) -> Tensor:
        return x @ self.matrices()[0].T.to(x.dtype)

    def _solve(self, y: Tensor) -> Tensor:
        return y @ self.matrices()[1].T.to(y.dtype)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return w @ self.matrices()[1].to(w.dtype)


@contextmanager
def evaluated_once(module: nn.Module) -> Iterator[None]:
    """Build the matrices of every dense transform at or below `module` once, here, and share them until the exit.

    The autograd graph is shared too: a second backward pass inside needs `retain_graph`, and gradients flow only if
    they were enabled at the entry. Parameters must not change inside. Blocks nest; the outermost owns what is shared.
    (Building here, not at the first use, keeps activation checkpointing right: a recomputed forward meets the same
    tensors.)
    """
    # Children first: QR builds on the shared matrices of its rotation.
    owned = [m for m in reversed(list(module.modules())) if isinstance(m, Dense) and m._shared is None]
    try:
        for dense in owned:
            dense._shared = dense._dense()
        yield
    finally:
        for dense in owned:
            dense._shared = None


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
