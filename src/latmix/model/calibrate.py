"""What a decoder layer sees: windows on their way through it, and the moments of what enters its linears.

Cost: one (partial) forward of the layer per input. Given up: layers whose keyword arguments depend on the data.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix import ranks, sharding
from latmix.archs import Arch, Input
from latmix.model.parts import layers, linear

BATCH = 8  # windows in one forward
ROWS = 1024  # of a moment matrix that are added to at a time

Arguments = Mapping[str, Any]
"""Keyword arguments of a layer's forward: rotary tables, a mask."""


@dataclass(frozen=True)
class Moments:
    """Of what enters the readers of an input, x. Attributes: hessian: mean of x xᵀ. cross: mean of y xᵀ, y what the
    original reads in the same place; None where no quantizer needs it."""

    hessian: Float[Tensor, "n n"]
    cross: Float[Tensor, "n n"] | None


class _Reached(Exception):
    """Ends a layer's forward once the wanted activation has been seen."""


@torch.no_grad()
def moments(
    layer: nn.Module,
    arguments: Arguments,
    batches: Iterable[Tensor],
    spot: Input,
    originals: Iterable[Float[Tensor, "tokens n"]] | None = None,
) -> Moments:
    """Of all tokens at that input, over the batches of all ranks: float32 products, added up in float64, where the
    order of the ranks' sums does not show.

    originals: what the original reads there, in the layer's basis, batch by batch; None: no cross moment.
    """
    reader = linear(layer, spot.readers[0])
    hessian = torch.zeros(reader.in_features, reader.in_features, dtype=torch.float64, device=reader.weight.device)
    cross = None if originals is None else torch.zeros_like(hessian)
    tokens, aims = torch.zeros((), dtype=torch.int64, device=hessian.device), iter(originals or ())
    for x in entering(layer, arguments, batches, spot):
        _add_products(hessian, x, x)
        tokens.add_(len(x))
        if cross is not None:
            _add_products(cross, next(aims), x)
    ranks.add_up(tokens, hessian, *(() if cross is None else (cross,)))
    return Moments(hessian.div_(tokens).float(), None if cross is None else cross.div_(tokens).float())


def _add_products(total: Float[Tensor, "n n"], y: Float[Tensor, "tokens n"], x: Float[Tensor, "tokens n"]) -> None:
    """Add yᵀx, some rows of it at a time: all of it would be half as large as the total."""
    for room, some in zip(total.split(ROWS), y.split(ROWS, dim=1), strict=True):
        room.add_(some.T @ x)


@torch.no_grad()
def entering(
    layer: nn.Module, arguments: Arguments, batches: Iterable[Tensor], spot: Input
) -> Iterator[Float[Tensor, "tokens n"]]:
    """What enters the readers of that input, batch by batch. Cost: a forward of the layer as far as that."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0].flatten(0, -2).float())
        raise _Reached

    hook = linear(layer, spot.readers[0]).register_forward_pre_hook(catch)
    try:
        for batch in batches:
            for _ in forward(layer, arguments, [batch]):
                pass
            yield caught.pop()
    finally:
        hook.remove()


@torch.no_grad()
def forward(layer: nn.Module, arguments: Arguments, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """What leaves the layer, batch by batch."""
    for hidden in batches:
        try:
            out = layer(hidden, **arguments)
        except _Reached:
            continue
        yield out[0] if isinstance(out, tuple) else out


class Stream:
    """The windows on their way through the layers of a whole model, in memory.

    Attributes:
        hidden: what enters the next layer, a tensor for each batch of windows.
        arguments: the keyword arguments of each layer's forward.
    """

    def __init__(self, model: PreTrainedModel, arch: Arch, windows: Int[Tensor, "windows window"]) -> None:
        self.layers = layers(model, arch)
        self.arguments = layer_arguments(model, arch, windows.shape[1])
        embed = model.get_submodule(arch.embedding)
        self.hidden = [embed(batch.to(sharding.computes_on(model))) for batch in windows.split(BATCH)]

    def hessian(self, index: int, spot: Input) -> Float[Tensor, "n n"]:
        return moments(self.layers[index], self.arguments[index], self.hidden, spot).hessian

    def advance(self, index: int) -> None:
        self.hidden = list(forward(self.layers[index], self.arguments[index], self.hidden))


@torch.no_grad()
def layer_arguments(model: PreTrainedModel, arch: Arch, window: int) -> list[Arguments]:
    """What the model gives each layer for a window of this length, which broadcasts over a batch since no window is
    padded. The model's own forward runs, its layers replaced by notes, so it need not have weights."""
    seen: list[Arguments] = []

    def note(hidden: Tensor, **arguments: Any) -> Tensor:
        seen.append(arguments)
        return hidden

    def same(hidden: Tensor) -> Tensor:
        return hidden

    replaced = [*layers(model, arch), model.get_submodule(arch.final_norm)]
    for module in replaced:
        module.forward = same if module is replaced[-1] else note  # shadows the class's
    try:
        empty = torch.zeros(1, window, model.config.hidden_size, dtype=model.dtype, device=next(model.buffers()).device)
        model.base_model(inputs_embeds=empty, use_cache=False)
    finally:
        for module in replaced:
            del module.forward
    return seen
