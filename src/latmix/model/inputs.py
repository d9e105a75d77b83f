"""Activations on their way into linears: the online transform, then fake quantization, once per activation.

The quantizer stands where the activation is made (the norm that q, k and v read, say), not at each of its readers: one
rounding for all of them, and the same values the readers would have seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from latmix.archs import Arch, Input
from latmix.model.maps import Maps
from latmix.model.parts import layers
from latmix.numerics import BlockFormat, fake_quant_with_scale_gradient, rotated_fake_quant
from latmix.numerics.kernels import by_hand
from latmix.transforms import Transform
from latmix.transforms.hadamard import Hadamard


class InputQuantizer:
    """What happens to an activation on its way into its readers: the online transform, then fake quantization."""

    def __init__(self, format: BlockFormat | None, online: Transform | None) -> None:
        self.format, self.online, self.active = format, online, True

    def __call__(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return quantized_input(x, self.online, self.format if self.active else None)


def quantized_input(
    x: Float[Tensor, "*batch n"], online: Transform | None, format: BlockFormat | None
) -> Float[Tensor, "*batch n"]:
    """`x` through the online transform, then rounded.

    Without a gradient and where there is a kernel by hand, a block-Hadamard and the rounding take one pass. It adds up
    in its own order: where that decides a tie, its value differs from the one that learning sees.
    """
    if format is not None and _in_one_pass(x, online, format):
        return rotated_fake_quant(x, format)
    if online is not None:
        x = online(x)
    return x if format is None else fake_quant_with_scale_gradient(x, format)


def _in_one_pass(x: Tensor, online: Transform | None, format: BlockFormat) -> bool:
    rotates = isinstance(online, Hadamard) and online.only_blocks_of(format.block)
    return rotates and by_hand([x], format) is not None and not torch.is_grad_enabled()


@dataclass(frozen=True)
class QuantizedInputs:
    """All quantizers on a model."""

    quantizers: tuple[InputQuantizer, ...]
    hooks: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def quantize_inputs(model: nn.Module, arch: Arch, maps: Maps, format: BlockFormat | None) -> QuantizedInputs:
    """Hook an `InputQuantizer` onto every input of every layer; `format` None leaves only the online transforms."""
    each = [quantize_layer_inputs(layer, arch, maps, i, format) for i, layer in enumerate(layers(model, arch))]
    return QuantizedInputs(sum((q.quantizers for q in each), ()), sum((q.hooks for q in each), ()))


def quantize_layer_inputs(
    layer: nn.Module, arch: Arch, maps: Maps, index: int, format: BlockFormat | None
) -> QuantizedInputs:
    """The same for one layer."""
    quantizers = tuple(InputQuantizer(format, maps.online(spot.name, index)) for spot in arch.inputs)
    hooks = tuple(watch(layer, spot, act) for spot, act in zip(arch.inputs, quantizers, strict=True))
    return QuantizedInputs(quantizers, hooks)


def watch(layer: nn.Module, spot: Input, act: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Pass `spot`'s activation through `act`: once at the norm that makes it, else at its only reader."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (act(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return act(output)

    if spot.norm is not None:
        return layer.get_submodule(spot.norm).register_forward_hook(after)
    (reader,) = spot.readers
    return layer.get_submodule(reader).register_forward_pre_hook(before)
