"""Kernels: the reference arithmetic, compiled where that works.

There is one arithmetic. `@kernel` hands the decorated function, as it stands, to `torch.compile`, which fuses its dozen
passes over memory into one (C++ on a CPU, Triton on a GPU). Elementwise it keeps IEEE semantics, so values are bit for
bit those of the reference, to which a law holds them; only sums may be added up in another order. Small tensors go
through the plain function, where starting a kernel costs more than it saves; so does everything on a machine without a
compiler, and `status` says why. Given up: kernels written by hand, which would have to be kept equal by care.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from latmix.numerics.formats import BlockFormat
from latmix.numerics.scales import from_blocks, to_blocks

LARGE = 1 << 16
"""Elements from which a compiled kernel is used: about where one pass over memory outlasts starting it."""

_failures: dict[str, str] = {}


def kernel(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile `reference(*tensors, format)`, whose tensors are of one shape, in blocks along the last dimension.

    The kernel is given rows of one block each, so one kernel per format, compiled in some seconds, serves every shape.
    `.reference` is the plain function.
    """
    compiled: dict[tuple[BlockFormat, torch.dtype, torch.device], Callable[..., Tensor]] = {}

    @functools.wraps(reference)
    def call(*arguments: Tensor | BlockFormat) -> Tensor:
        tensors, format = [each for each in arguments if isinstance(each, Tensor)], arguments[-1]
        assert isinstance(format, BlockFormat)
        first = tensors[0]
        if first.numel() < LARGE or reference.__name__ in _failures or torch.compiler.is_compiling():
            return reference(*arguments)
        blocks = [to_blocks(tensor, format.block) for tensor in tensors]
        rows = [tensor.detach().reshape(-1, format.block) for tensor in blocks]
        key = (format, first.dtype, first.device)
        try:
            if key not in compiled:
                compiled[key] = _compile(reference, rows, format)
            with torch.no_grad():
                out = compiled[key](*rows)
        except RuntimeError as error:  # as all errors of the compiler are
            _failures[reference.__name__] = str(error).strip().splitlines()[0]
            warnings.warn(f"{reference.__name__} is not compiled: {_failures[reference.__name__]}", stacklevel=2)
            return reference(*arguments)
        return from_blocks(out.view(blocks[0].shape), first.shape[-1])

    call.reference = reference  # type: ignore[attr-defined]
    return call


def _compile(reference: Callable[..., Tensor], rows: list[Tensor], format: BlockFormat) -> Callable[..., Tensor]:
    """Record the operations on tensors first, so that the compiler meets no Python; the number of rows stays open."""
    recorded = make_fx(lambda *tensors: reference(*tensors, format), tracing_mode="symbolic")(*rows)
    for tensor in rows:
        torch._dynamo.mark_dynamic(tensor, 0)
    return torch.compile(recorded, fullgraph=True)


def status() -> str:
    """ "compiled", or which functions are not, and why."""
    return "; ".join(f"{name}: {why}" for name, why in _failures.items()) or "compiled"
