"""The weights of a decoder layer, quantized to what enters them.

Each layer sees what it will see at inference: inputs from the layers before it as they were quantized, activations
rounded at its own inputs. Within a layer the inputs are taken in the order of computation: the down projection is
calibrated on what the quantized gate and up projections produce.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix import ranks
from latmix.archs import Arch, Input
from latmix.errors import LatmixError
from latmix.model.calibrate import Moments
from latmix.model.parts import linear
from latmix.model.tensors import PIECE
from latmix.numerics import BlockFormat, Quantized, choose_tensor_scale, decode
from latmix.numerics.rounding import power_of_two_below
from latmix.weights import MoreDamping, WeightQuantizer


@dataclass(frozen=True)
class Calibrated:
    """Attributes:
    quantized: linear → codes and scales.
    damping: linear → damping of its Hessian, where it needed more than it was given.
    dead: linear → how many of its inputs never were anything but zero, where there are any.
    """

    quantized: dict[str, Quantized]
    damping: dict[str, float]
    dead: dict[str, int]


@torch.no_grad()
def quantize_layer(
    layer: nn.Module,
    arch: Arch,
    quantizer: WeightQuantizer,
    format: BlockFormat,
    moments: Callable[[Input], Moments] | None,
) -> Calibrated:
    """Put the quantized values into the weight of every linear of a layer; ranks share the linears of an input.

    moments: of an input of the layer as it is now; None for quantizers that need none.

    Raises: LatmixError: a weight quantizer failed; names the linear.
    """
    found = Calibrated({}, {}, {})
    for spot in arch.inputs:
        seen = None if moments is None else moments(spot)
        dead = 0 if seen is None else int((seen.hessian.diagonal() == 0).sum())
        quantize_readers(layer, spot.readers, quantizer, format, seen, found, shared=True)
        for name in spot.readers:
            if dead:
                found.dead[name] = dead
            linear(layer, name).weight = nn.Parameter(decoded(found.quantized[name]), requires_grad=False)
    return found


def quantize_readers(
    layer: nn.Module,
    names: Iterable[str],
    quantizer: WeightQuantizer,
    format: BlockFormat,
    seen: Moments | None,
    found: Calibrated,
    *,
    shared: bool = False,
) -> None:
    """Add codes and scales of linears that read one input to what was found; their weights stay as they are.

    shared: all ranks are at the same linears, and each takes some of them.

    Raises: LatmixError: a weight quantizer failed; names the linear.
    """
    weights = {name: linear(layer, name).weight for name in names}
    tensor_scale = shared_scale(list(weights.values()), format)
    hessian, cross = (None, None) if seen is None else (seen.hessian, seen.cross)

    def quantized(name: str) -> tuple[Quantized, float | None]:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", MoreDamping)
                made = quantizer(weights[name], hessian, format, tensor_scale, cross)
        except LatmixError as error:
            raise type(error)(f"{name}: {error}") from error
        more = [warning.message.damping for warning in caught if isinstance(warning.message, MoreDamping)]
        return made.to("cpu") if shared else made, more[-1] if more else None

    each = ranks.shared_out(list(weights), quantized) if shared else map(quantized, weights)
    for (name, weight), (made, damping) in zip(weights.items(), each, strict=True):
        found.quantized[name] = made.to(weight.device)
        if damping is not None:
            found.damping[name] = damping


def decoded(quantized: Quantized) -> Float[Tensor, "out n"]:
    """What `decode` gives, some rows at a time: its temporaries are as large as a piece."""
    codes, scales = quantized.codes, quantized.scales
    whole, step = torch.empty(codes.shape, dtype=quantized.dtype, device=codes.device), max(1, PIECE // codes.shape[-1])
    for at in range(0, len(codes), step):
        some = slice(at, at + step)
        whole[some] = decode(replace(quantized, codes=codes[some], scales=scales[some]))
    return whole


def shared_scale(weights: list[Tensor], format: BlockFormat) -> Float[Tensor, ""] | None:
    """One tensor-wide scale for the linears that read an input, which engines run as one; None where there is none.

    Up to a power of two: of an element times a block's scale bfloat16 then holds every bit, and engines decode to it.
    """
    scales = [choose_tensor_scale(weight, format) for weight in weights]
    if scales[0] is None:
        return None
    largest = torch.stack([scale for scale in scales if scale is not None]).amax()
    below = power_of_two_below(largest)
    return below * (1 + (largest > below))
