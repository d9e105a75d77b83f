"""Round to nearest: every weight goes to the nearest value that its block's scale allows.

The baseline, and the quantizer that needs no data. It stays data free: a Hessian could weight the "search" scale rule,
but then "RTN" would name two methods, and its results would depend on the calibration text. Given up: that small gain.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from latmix.numerics import BlockFormat, Quantized, encode
from latmix.weights.base import WEIGHT_QUANTIZERS, WeightQuantizer


@dataclass(frozen=True)
class RTN(WeightQuantizer):
    """`encode(weight, format)`; NaN and Inf as there: the NaN scale marks their block."""

    needs_hessian: ClassVar[bool] = False

    def __call__(
        self,
        weight: Float[Tensor, "out n"],
        hessian: Float[Tensor, "n n"] | None,
        format: BlockFormat,
        tensor_scale: Float[Tensor, ""] | None = None,
    ) -> Quantized:
        return encode(weight, format, tensor_scale=tensor_scale)


WEIGHT_QUANTIZERS.add("rtn", RTN)
