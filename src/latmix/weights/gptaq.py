"""GPTAQ: GPTQ that aims at the original's outputs, whatever the quantized model makes of the inputs (2504.02692).

By the time a layer is quantized its inputs x are those of a quantized model: layers before have erred, and x itself has
been rounded. GPTQ keeps W x, errors of x included. With y the original's input in the same place, the wanted output is
W y, and the mean of ‖Q x − W y‖² is, with H = mean of x xᵀ and C = mean of y xᵀ,

    tr((Q − W*) H (Q − W*)ᵀ) + what no Q changes,      W* = W C H⁻¹,

so GPTQ on W* it is. W* makes up for earlier layers where x tells their errors, and shrinks what reads directions in
which x is little else than rounding: as a Wiener filter does, and with activations of 4 bits that is most of the gain
(docs/log.md, 2026-11-24). The authors get the same codes column by column, for the sake of speed.

Given up: sharing C H⁻¹ among weights that read the same input.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from latmix.errors import InputError
from latmix.numerics import BlockFormat, Quantized
from latmix.weights.base import WEIGHT_QUANTIZERS
from latmix.weights.gptq import GPTQ, check_moment, mean_diagonal


@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """As `GPTQ`, on the weight whose outputs are nearest to the original's. Scales follow that weight too.

    damping: as there, and it pulls W* towards W.

    Raises: LatmixError: as there; no cross moment, or one of another size, or not finite.
    Cost: another n³ + out·n² multiply-adds; 16 n² bytes instead of 8, 8 for each element of the weight.
    """

    needs_cross: ClassVar[bool] = True

    def __call__(
        self,
        weight: Float[Tensor, "out n"],
        hessian: Float[Tensor, "n n"] | None,
        format: BlockFormat,
        tensor_scale: Float[Tensor, ""] | None = None,
        cross: Float[Tensor, "n n"] | None = None,
    ) -> Quantized:
        if hessian is None or cross is None:
            raise InputError("gptaq needs the Hessian of the weight's inputs and the cross moment.")
        for name, moment in (("Hessian", hessian), ("cross moment", cross)):
            check_moment("gptaq", name, moment, weight.shape[-1])
        aimed = self.aimed(weight, hessian.to(weight.device), cross.to(weight.device))
        return super().__call__(aimed, hessian, format, tensor_scale)

    def aimed(
        self, weight: Float[Tensor, "out n"], hessian: Float[Tensor, "n n"], cross: Float[Tensor, "n n"]
    ) -> Float[Tensor, "out n"]:
        """W*, in the weight's dtype."""
        pull = self.damping * mean_diagonal(hessian.diagonal())
        wanted = _pulled(cross, pull).T @ weight.double().T
        found: Tensor = torch.linalg.solve(_pulled(hessian, pull), wanted).T
        return found.to(weight.dtype).contiguous()


def _pulled(moment: Float[Tensor, "n n"], pull: Float[Tensor, ""]) -> Float64[Tensor, "n n"]:
    """In float64, with more on its diagonal."""
    wide = moment.to(torch.float64, copy=True)
    wide.diagonal().add_(pull)
    return wide


WEIGHT_QUANTIZERS.add("gptaq", GPTAQ)
