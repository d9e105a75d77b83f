"""Weight quantization through the model, one decoder layer at a time.

Each layer sees what it will see at inference: inputs from the layers before it as they were quantized, activations
rounded at its own inputs. Within a layer the inputs are taken in the order of computation: the down projection is
calibrated on what the quantized gate and up projections produce. Cost: one (partial) forward of each layer per input,
and the hidden states of all calibration windows in memory. Given up: layers whose keyword arguments depend on the data.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.archs import Arch, Input
from latmix.errors import LatmixError
from latmix.model.parts import layers, linear
from latmix.numerics import BlockFormat, Quantized, decode
from latmix.weights import WeightQuantizer

BATCH = 8  # windows in one forward


@torch.no_grad()
def quantize_weights(
    model: PreTrainedModel,
    arch: Arch,
    windows: Int[Tensor, "windows window"],
    quantizer: WeightQuantizer,
    format: BlockFormat,
    done: Callable[[int], None],
) -> dict[str, Quantized]:
    """Replace every linear's weight by its quantized values, and return codes and scales by module path.

    The model's inputs must already be quantized (`quantize_inputs`). `done(layer)` is called after each layer.
    Raises: LatmixError: a weight quantizer failed; names the linear.
    """
    quantized: dict[str, Quantized] = {}
    stream = Stream(model, arch, windows) if quantizer.needs_hessian else None
    for index, layer in enumerate(layers(model, arch)):
        for spot in arch.inputs:
            hessian = stream.hessian(index, spot) if stream else None
            for name in spot.readers:
                place, path = linear(layer, name), f"{arch.layers}.{index}.{name}"
                try:
                    quantized[path] = quantizer(place.weight, hessian, format)
                except LatmixError as error:
                    raise LatmixError(f"{path}: {error}") from error
                place.weight = nn.Parameter(decode(quantized[path]), requires_grad=False)
        if stream:
            stream.advance(index)
        done(index)
    return quantized


class _Reached(Exception):
    """Ends a layer's forward once the wanted activation has been seen."""


class Stream:
    """The calibration windows on their way through the layers.

    Attributes:
        hidden: what enters the next layer, a tensor for each batch of windows.
        arguments: the keyword arguments of each layer's forward.
    """

    def __init__(self, model: PreTrainedModel, arch: Arch, windows: Int[Tensor, "windows window"]) -> None:
        self.layers = layers(model, arch)
        self.arguments = _layer_arguments(model, self.layers, windows[:1].to(model.device))
        embed = model.get_submodule(arch.embedding)
        self.hidden = [embed(batch.to(model.device)) for batch in windows.split(BATCH)]

    @torch.no_grad()
    def hessian(self, index: int, spot: Input) -> Float[Tensor, "n n"]:
        """Mean of x xᵀ over all tokens at that input, float32 sums of float32 products."""
        total, tokens = 0.0, 0

        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal total, tokens
            x = args[0].flatten(0, -2).float()
            total, tokens = total + x.T @ x, tokens + len(x)
            raise _Reached

        hook = self.layers[index].get_submodule(spot.readers[0]).register_forward_pre_hook(collect)
        try:
            for _ in self._run(index):
                pass
        finally:
            hook.remove()
        assert isinstance(total, Tensor)
        return total / tokens

    @torch.no_grad()
    def advance(self, index: int) -> None:
        self.hidden = list(self._run(index))

    def _run(self, index: int) -> Iterator[Tensor]:
        for hidden in self.hidden:
            try:
                out = self.layers[index](hidden, **self.arguments[index])
            except _Reached:
                continue
            yield out[0] if isinstance(out, tuple) else out


def _layer_arguments(
    model: PreTrainedModel, layers: list[nn.Module], window: Int[Tensor, "1 window"]
) -> list[dict[str, Any]]:
    """The keyword arguments (rotary tables, masks) the model gives each layer for a window of this length; they
    broadcast over a batch, since no window is padded."""
    seen: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(window, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
