"""Kernels: the reference arithmetic in one pass over memory, chosen by what there is.

On a CPU `blocks.cpp` does the common formats in float32 and bfloat16 (`native`): written by hand, and held to the
reference bit for bit by laws. Everything else is the reference itself, as it stands, through `torch.compile`: one
arithmetic, fused into C++ on a CPU and Triton on a GPU. On a CPU that reaches a third of the speed of `blocks.cpp`, as
it computes scales one at a time; hence the second one. Elementwise all keep IEEE semantics; only sums may be added up
in another order. Small tensors go through the plain function, where starting a kernel costs more than it saves; so does
everything on a machine without a compiler, and `status` says why.
"""

import functools
import subprocess
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from latmix.numerics import native
from latmix.numerics.formats import BlockFormat
from latmix.numerics.scales import from_blocks, to_blocks

SMALL = 1 << 12
"""Elements from which `blocks.cpp` is used: below, its compilation would outlast all it is asked for."""
LARGE = 1 << 16
"""Elements from which a compiled reference is used: about where one pass over memory outlasts starting it."""

P, T = ParamSpec("P"), TypeVar("T")

_used: set[str] = set()
_failures: dict[str, str] = {}


def kernel(by_hand: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorates `reference(*tensors, format)`, whose tensors are of one shape, in blocks along the last dimension.

    Either kernel is given whole blocks, so that those of one format serve every shape: `by_hand(*tensors, format)`, and
    the reference compiled, in some seconds for each format. `.reference` is the plain function.
    """

    def decorate(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
        recorded = _Recorded(reference)

        @functools.wraps(reference)
        def call(*arguments: Tensor | BlockFormat) -> Tensor:
            tensors, format = [each for each in arguments if isinstance(each, Tensor)], arguments[-1]
            assert isinstance(format, BlockFormat)
            name, run = ("C++", by_hand) if native.covers(tensors, format) else ("torch.compile", recorded)
            least = SMALL if run is by_hand else LARGE
            if tensors[0].numel() < least:
                return reference(*arguments)
            blocks = [to_blocks(tensor.detach(), format.block).contiguous() for tensor in tensors]
            out = attempt(name, run, *blocks, format)
            return reference(*arguments) if out is None else from_blocks(out, tensors[0].shape[-1])

        call.reference = reference  # type: ignore[attr-defined]
        return call

    return decorate


class _Recorded:
    """A reference, compiled for each format, dtype and device that it meets; it is given rows of one block each."""

    def __init__(self, reference: Callable[..., Tensor]) -> None:
        self.reference = reference
        self.compiled: dict[tuple[BlockFormat, torch.dtype, torch.device], Callable[..., Tensor]] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        *blocks, format = arguments
        rows = [block.view(-1, block.shape[-1]) for block in blocks]
        key = (format, rows[0].dtype, rows[0].device)
        if key not in self.compiled:
            self.compiled[key] = self._compile(rows, format)
        with torch.no_grad():
            return self.compiled[key](*rows).view(blocks[0].shape)

    def _compile(self, rows: list[Tensor], format: BlockFormat) -> Callable[..., Tensor]:
        """Record the operations on tensors first, so the compiler meets no Python; the number of rows stays open."""
        recorded = make_fx(lambda *tensors: self.reference(*tensors, format), tracing_mode="symbolic")(*rows)
        for tensor in rows:
            torch._dynamo.mark_dynamic(tensor, 0)
        return torch.compile(recorded, fullgraph=True)


def attempt(name: str, run: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T | None:
    """`run(*arguments)`, or None where kernels of that name do not work, which is said once."""
    if name in _failures or torch.compiler.is_compiling():
        return None
    try:
        out: T = run(*arguments, **keywords)
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:  # RuntimeError: all of torch.compile's
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        _failures[name] = said.strip().splitlines()[0]
        warnings.warn(f"No kernels by {name}: {_failures[name]}", stacklevel=3)
        return None
    _used.add(name)
    return out


def status() -> str:
    """What has computed so far ("C++, torch.compile"; "reference" if neither has), and what cannot, and why."""
    return "; ".join(
        [", ".join(sorted(_used)) or "reference", *(f"no {name}: {why}" for name, why in _failures.items())]
    )
