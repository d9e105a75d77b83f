"""Round to nearest: every weight goes to the nearest value that its block's scale allows.

The baseline, and the quantizer that needs no data. It stays data free: a Hessian could weight the "search" scale rule,
but then "RTN" would name two methods, and its results would depend on the calibration text. Given up: that small gain.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from latmix.numerics import BlockFormat, Quantized, choose_tensor_scale, encode
from latmix.weights.base import WEIGHT_QUANTIZERS, WeightQuantizer

PIECE = 2**19
"""Elements that are rounded at a time: rows do not depend on one another."""


@dataclass(frozen=True)
class RTN(WeightQuantizer):
    """Round to nearest, `encode(weight, format)`; NaN and Inf as there: the NaN scale marks their block.

    Cost: 24 bytes for each element of a piece, and one for each of the weight's.
    """

    needs_hessian: ClassVar[bool] = False

    def __call__(
        self,
        weight: Float[Tensor, "out n"],
        hessian: Float[Tensor, "n n"] | None,
        format: BlockFormat,
        tensor_scale: Float[Tensor, ""] | None = None,
        cross: Float[Tensor, "n n"] | None = None,
    ) -> Quantized:
        if tensor_scale is None:
            tensor_scale = choose_tensor_scale(weight, format)
        step, device = max(1, PIECE // weight.shape[-1]), weight.device
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=device)
        scales = torch.empty(len(weight), -(-weight.shape[-1] // format.block), dtype=torch.uint8, device=device)
        for piece, *room in zip(weight.split(step), codes.split(step), scales.split(step), strict=True):
            part = encode(piece, format, tensor_scale=tensor_scale)
            room[0].copy_(part.codes)
            room[1].copy_(part.scales)
        return dataclasses.replace(part, codes=codes, scales=scales)


WEIGHT_QUANTIZERS.add("rtn", RTN)
