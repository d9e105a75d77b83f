"""A linear map becomes affine: the learned shift v moves a distribution into the middle of the grid."""

from jaxtyping import Float
from torch import Tensor, nn

from latmix.transforms.base import Transform


class Affine(Transform):
    """T(x) = (linear part)(x) + v, with v learned, zero at the start.

    Args:
        linear_part: any transform; a shift of its own is added to v.
        within: on the residual stream, v ends with the last decoder layer, whose last linear takes it off again; the
            head reads the linear part and needs no bias.
    """

    def __init__(self, linear_part: Transform, within: bool = False) -> None:
        super().__init__(linear_part.size, linear_part.orthogonal)
        self.linear_part, self.within = linear_part, within
        self.offset = nn.Parameter(linear_part.reference.new_zeros(self.size))

    @property
    def shift(self) -> Float[Tensor, " n"]:
        inner = self.linear_part.shift
        return self.offset if inner is None else inner + self.offset

    def _linear(self, x: Tensor) -> Tensor:
        return self.linear_part.linear(x)

    def _solve(self, y: Tensor) -> Tensor:
        return self.linear_part.solve(y)

    def _transposed_solve(self, w: Tensor) -> Tensor:
        return self.linear_part.transposed_solve(w)

    def logabsdet(self) -> Float[Tensor, ""]:
        return self.linear_part.logabsdet()

    def singular_values(self) -> Float[Tensor, " n"]:
        return self.linear_part.singular_values()
