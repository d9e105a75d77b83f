"""Kernels: the reference arithmetic in one pass over memory, chosen by what there is.

The common formats in float32 and bfloat16 have kernels written by hand and held to the reference bit for bit by laws:
`blocks.cpp` on a CPU (`native`), `blocks_triton.py` on a GPU (`gpu`). Everything else (float64, NVFP4, "search") is the
reference itself, as it stands, through `torch.compile`: one arithmetic, fused into C++ or Triton. On a CPU that reaches
a third of the speed of `blocks.cpp`, as it computes scales one at a time; hence the second one. Elementwise all keep
IEEE semantics; only sums may be added up in another order. Small tensors go through the plain function, where starting
a kernel costs more than it saves; so does everything on a machine without a compiler, and `compiled.status` says why.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from latmix.compiled import SMALL, attempt
from latmix.numerics import native
from latmix.numerics.formats import BlockFormat
from latmix.numerics.scales import from_blocks, to_blocks

LARGE = 1 << 16
"""Elements from which a compiled reference is used: about where one pass over memory outlasts starting it."""


@runtime_checkable
class ByHand(Protocol):
    """A module of kernels for one kind of device. They are given whole blocks, contiguous and on that device, and make
    what the references of the same names make, in one pass; `rotated_values` and `codes` what `rotated_fake_quant` and
    `encode` do; `pack` at 4 bits, for rows of even length."""

    NAME: str

    def quantized_values(self, x: Tensor, fmt: BlockFormat) -> Tensor: ...
    def rotated_values(self, x: Tensor, fmt: BlockFormat) -> Tensor: ...
    def codes(self, x: Tensor, scales: Tensor | None, fmt: BlockFormat) -> tuple[Tensor, Tensor]: ...
    def pack(self, codes: Tensor) -> Tensor: ...
    def scale_gradient(self, gradient: Tensor, x: Tensor, quantized: Tensor, fmt: BlockFormat) -> Tensor: ...
    def round_columns(
        self, weight: Tensor, wanted: Tensor, feedback: Tensor, scales: Tensor, error: Tensor, fmt: BlockFormat
    ) -> bool: ...


def by_hand(tensors: Sequence[Tensor], fmt: BlockFormat, scales_given: bool = False) -> ByHand | None:
    """The kernels that compute functions of these tensors, which are of one shape, under this format."""
    dtypes = {tensor.dtype for tensor in tensors}
    known = fmt.scale_element == "e8m0" if scales_given else fmt.scale in native.CARRIES
    return on_device(tensors) if known and (dtypes == {torch.float32} or dtypes == {torch.bfloat16}) else None


def on_device(tensors: Sequence[Tensor]) -> ByHand | None:
    """The kernels by hand of the device that all these tensors are on."""
    devices = {tensor.device.type for tensor in tensors}
    if devices == {"cpu"}:
        return native
    if devices == {"cuda"} and importlib.util.find_spec("triton") is not None:
        from latmix.numerics import gpu  # needs Triton, whose import takes a while

        return gpu
    return None


def kernel(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates `reference(*tensors, format)`, whose tensors are of one shape, in blocks along the last dimension.

    Either kernel is given whole blocks, so that those of one format serve every shape: the one by hand of the same
    name, and the reference compiled, in some seconds for each format. `.reference` is the plain function.
    """
    recorded = _Recorded(reference)

    @functools.wraps(reference)
    def call(*arguments: Tensor | BlockFormat) -> Tensor:
        tensors, format = [each for each in arguments if isinstance(each, Tensor)], arguments[-1]
        assert isinstance(format, BlockFormat)
        kernels = by_hand(tensors, format)
        if tensors[0].numel() < (SMALL if kernels else LARGE):
            return reference(*arguments)
        name, run = (kernels.NAME, getattr(kernels, reference.__name__)) if kernels else ("torch.compile", recorded)
        blocks = [to_blocks(tensor.detach(), format.block).contiguous() for tensor in tensors]
        out = attempt(name, run, *blocks, format)
        return reference(*arguments) if out is None else from_blocks(out, tensors[0].shape[-1])

    call.reference = reference  # type: ignore[attr-defined]
    return call


class _Recorded:
    """A reference, compiled for each format, dtype and device that it meets; it is given rows of one block each. One
    thread at a time: torch.compile is not made for several."""

    def __init__(self, reference: Callable[..., Tensor]) -> None:
        self.reference, self._alone = reference, threading.Lock()
        self.compiled: dict[tuple[BlockFormat, torch.dtype, torch.device], Callable[..., Tensor]] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        *blocks, format = arguments
        rows = [block.view(-1, block.shape[-1]) for block in blocks]
        key = (format, rows[0].dtype, rows[0].device)
        with self._alone, torch.no_grad():
            if key not in self.compiled:
                self.compiled[key] = self._compile(rows, format)
            return self.compiled[key](*rows).view(blocks[0].shape)

    def _compile(self, rows: list[Tensor], format: BlockFormat) -> Callable[..., Tensor]:
        """Record the operations on tensors first, so the compiler meets no Python; the number of rows stays open."""
        recorded = make_fx(lambda *tensors: self.reference(*tensors, format), tracing_mode="symbolic")(*rows)
        for tensor in rows:
            torch._dynamo.mark_dynamic(tensor, 0)
        return torch.compile(recorded, fullgraph=True)
