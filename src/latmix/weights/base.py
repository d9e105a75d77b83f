"""What a weight quantizer is: a function of one weight, the Hessian of its inputs and a format, with its settings.

It knows no model and no hooks. The layer's loss is quadratic in the weight: with inputs x and ΔW = W − Ŵ the mean of
‖ΔW x‖² is tr(ΔW H ΔWᵀ), H = mean of x xᵀ. Half of the true second derivative, but no quantizer sees the factor.

The quantized model's inputs x are not what the original reads in their place, y: with C = mean of y xᵀ, a quantizer can
also aim at the original's outputs W y.

Given up: quantizers that couple several weights, and losses that look past the layer.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import InputError
from latmix.numerics import BlockFormat, Quantized, decode
from latmix.registry import Registry, parse_spec


@dataclasses.dataclass(frozen=True)
class WeightQuantizer(ABC):
    """Settings as fields (float, int or bool, each with a default), the work in `__call__`.

    Attributes:
        needs_hessian: False for data-free quantizers. They take a Hessian all the same, and ignore it; they round each
            row alone, so that a weight may be given in pieces.
        needs_cross: whether they need the cross moment; the others ignore it.
    """

    needs_hessian: ClassVar[bool]
    needs_cross: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        weight: Float[Tensor, "out n"],
        hessian: Float[Tensor, "n n"] | None,
        format: BlockFormat,
        tensor_scale: Float[Tensor, ""] | None = None,
        cross: Float[Tensor, "n n"] | None = None,
    ) -> Quantized:
        """Codes and scales for `weight`, in blocks along n; `decode` returns them in the weight's dtype.

        Args:
            hessian: mean of x xᵀ over the calibration tokens; float32 or float64.
            tensor_scale: of formats that have one, where several weights share it; by default this weight's own.
            cross: mean of y xᵀ over the same tokens.

        Raises:
            LatmixError: a Hessian or weight that it cannot work with.
        """


class MoreDamping(UserWarning):
    """A Hessian was not positive definite with the damping it was given; `damping` is what it needed."""

    def __init__(self, damping: float) -> None:
        super().__init__(f"The Hessian needed damping {damping:g} to be positive definite.")
        self.damping = damping


WEIGHT_QUANTIZERS: Registry[type[WeightQuantizer]] = Registry("weight quantizer")


def parse_quantizer(text: str) -> WeightQuantizer:
    """Read `"rtn"` or `"gptq:damping=0.05,act_order=false"`.

    Raises:
        LatmixError: an unknown name or setting, or a value of the wrong type or range.
    """
    name, properties = parse_spec(text)
    quantizer = WEIGHT_QUANTIZERS[name]
    types = {field.name: field.type for field in dataclasses.fields(quantizer)}
    settings = {}
    for key, value in properties.items():
        if key not in types:
            raise InputError(f"{name}: unknown setting '{key}'; known: {', '.join(types) or 'none'}.")
        settings[key] = _value(value, types[key], f"{name}: {key}")
    return quantizer(**settings)


def _value(text: str, kind: object, key: str) -> bool | int | float:
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"{key} is '{text}'; it must be true or false.")
        return text == "true"
    try:
        return int(text) if kind is int else float(text)
    except ValueError as error:
        raise InputError(f"{key} is '{text}'; it must be {'an integer' if kind is int else 'a number'}.") from error


@torch.no_grad()
def proxy_loss(weight: Float[Tensor, "out n"], quantized: Quantized, hessian: Float[Tensor, "n n"]) -> float:
    """tr(ΔW H ΔWᵀ) / out, ΔW = weight − decode(quantized): the mean squared output error of a row, over H's tokens.

    Cost: 2 out·n² in float64.
    """
    error = weight.double() - decode(quantized).double()
    return float((error @ hessian.to(error)).mul_(error).sum() / len(error))
