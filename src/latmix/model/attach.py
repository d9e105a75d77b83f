"""Maps and quantizers on a live model: Hugging Face's own forward runs, only its linears and their inputs are changed.

A linear that reads basis S and writes basis T computes, with column vectors,

    y = T ∘ (W, b) ∘ S⁻¹  =  (A_T W A_S⁻¹) x + A_T (b − W A_S⁻¹ v_S) + k v_T

(k is 1, but 0 for a writer of the residual stream, where the embedding has put v_T already, and −1 for its last writer
if the shift ends there). `moved` is that one formula; attached linears evaluate it in every forward, so that gradients
reach the maps, `latmix.model.fold` evaluates it once in float64. Replacing a linear by a module that holds it, instead
of parametrizing its weight and bias tensors one by one, keeps the formula whole and leaves nothing behind: afterwards a
plain linear stands in its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.errors import InputError
from latmix.model.inputs import InputQuantizer, QuantizedInputs, quantize_inputs
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear
from latmix.numerics import BlockFormat, fake_quant_with_scale_gradient
from latmix.transforms import Affine, Compose, Repeat, Transform


def moved(
    weight: Float[Tensor, "out n"],
    bias: Float[Tensor, " out"] | None,
    source: Transform | None,
    target: Transform | None,
    *,
    shifts: int,
) -> tuple[Float[Tensor, "out n"], Float[Tensor, " out"] | None]:
    """Weight and bias of the linear after the changes of basis. Cost: out·n² + n·out² multiplications.

    `shifts`: how often this writer adds the target's shift, k above.
    """
    if source is not None:
        weight = source.transposed_solve(weight)
        if source.shift is not None:
            back = weight @ source.shift
            bias = -back if bias is None else bias - back
    if target is not None:
        weight = target.linear(weight.T).T
        bias = None if bias is None else target.linear(bias)
        if target.shift is not None and shifts:
            shift = shifts * target.shift
            bias = shift if bias is None else bias + shift
    return weight, bias


class MovedLinear(nn.Module):
    """A linear between two changed bases, differentiable in the maps. It borrows the maps (`Maps` owns them)."""

    def __init__(
        self,
        linear: nn.Linear,
        source: Transform | None,
        target: Transform | None,
        *,
        shifts: int,
        format: BlockFormat | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.shifts, self.format, self.active = linear, shifts, format, True
        self._maps = (source, target)  # in a tuple: not submodules of this linear

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch out"]:
        with torch.autocast(x.device.type, enabled=False):  # activations may be in bfloat16, maps and weights are not
            weight, bias = moved(self.linear.weight, self.linear.bias, *self._maps, shifts=self.shifts)
            if self.format is not None and self.active:
                weight = fake_quant_with_scale_gradient(weight, self.format)
        return F.linear(x, weight, bias)


class MovedHead(nn.Module):
    """The head reads the stream: the inverse map acts on activations, which costs less than on a large vocabulary."""

    def __init__(self, linear: nn.Linear, source: Transform) -> None:
        super().__init__()
        self.linear = linear
        self._source = (source,)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch vocabulary"]:
        out: Tensor = self.linear(self._source[0].inverse(x))
        return out


class MovedEmbedding(nn.Module):
    """The embedding writes the stream, shift included."""

    def __init__(self, embedding: nn.Embedding, target: Transform) -> None:
        super().__init__()
        self.embedding = embedding
        self._target = (target,)

    def forward(self, ids: Tensor) -> Float[Tensor, "*batch n"]:
        out: Tensor = self._target[0](self.embedding(ids))
        return out


class MovedNorm(nn.Module):
    """A norm whose gain writes a basis: a diagonal map scales it."""

    def __init__(self, norm: nn.Module, target: Transform) -> None:
        super().__init__()
        self.norm = norm
        self._target = (target,)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return self._target[0].linear(self.norm(x))


@dataclass(frozen=True)
class Attached:
    """A model with maps in its linears and quantizers on its inputs."""

    model: PreTrainedModel
    arch: Arch
    maps: Maps
    inputs: QuantizedInputs

    @contextmanager
    def unquantized(self) -> Iterator[None]:
        """Within, neither activations nor weights are rounded: what the maps alone do to the model."""
        linears = [module for module in self.model.modules() if isinstance(module, MovedLinear)]
        quantizers: list[InputQuantizer | MovedLinear] = [*self.inputs.quantizers, *linears]
        for quantizer in quantizers:
            quantizer.active = False
        try:
            yield
        finally:
            for quantizer in quantizers:
                quantizer.active = True


def attach(
    model: PreTrainedModel,
    arch: Arch,
    maps: Maps,
    activations: BlockFormat | None = None,
    weights: BlockFormat | None = None,
) -> Attached:
    """Put maps, activation quantizers and (optionally) weight fake quantization on `model`, in place.

    The model's norm gains must have been absorbed (`latmix.model.fold.absorb_gains`).
    Raises: InputError: a map's size does not fit its place.
    """
    heads, every = model.config.num_key_value_heads, layers(model, arch)
    for index, layer in enumerate(every):
        for name in arch.linears:
            source, target = linear_maps(arch, maps, layer, name, index, heads)
            if source is not None or target is not None or weights is not None:
                shifts = added_shifts(arch, name, target, last=index == len(every) - 1)
                layer.set_submodule(
                    name, MovedLinear(linear(layer, name), source, target, shifts=shifts, format=weights)
                )
        for site in arch.sites:
            if (norm := arch.norm(site)) is not None and (gain_map := maps.folded(site.name, index)) is not None:
                layer.set_submodule(norm, MovedNorm(layer.get_submodule(norm), gain_map))
    for site in arch.sites:
        if site.stream and (stream_map := maps.folded(site.name, 0)) is not None:
            embedding = model.get_submodule(arch.embedding)
            assert isinstance(embedding, nn.Embedding)
            model.set_submodule(arch.embedding, MovedEmbedding(embedding, stream_map))
            model.set_submodule(arch.head, MovedHead(linear(model, arch.head), seen_by_head(stream_map)))
    return Attached(model, arch, maps, quantize_inputs(model, arch, maps, activations))


def seen_by_head(map: Transform) -> Transform:
    """The stream's map after the last layer: without its shift, where that ends there."""
    return map.linear_part if isinstance(map, Affine) and map.within else map


def added_shifts(arch: Arch, name: str, target: Transform | None, *, last: bool) -> int:
    """How often a writer adds the target's shift: k of `moved`."""
    writes = arch.target(name)
    if writes is None or not writes.stream:
        return 1
    return -1 if last and name == writes.writers[-1] and isinstance(target, Affine) and target.within else 0


def linear_maps(
    arch: Arch, maps: Maps, layer: nn.Module, name: str, index: int, heads: int
) -> tuple[Transform | None, Transform | None]:
    """(source, target) of one linear. The source includes the online transform of its input, which acts last.

    heads: number of KV heads, shared out over the queries where the linear is wider than its map.
    Raises: InputError: a map's size does not fit the linear.
    """
    found = layer.get_submodule(name)
    plain = found.linear if isinstance(found, MovedLinear) else linear(layer, name)
    writes = arch.target(name)
    target = maps.folded(writes.name, index) if writes else None
    spot = next(spot for spot in arch.inputs if name in spot.readers)
    found_maps = [maps.folded(site.name, index) for site in arch.sources(name)] + [maps.online(spot.name, index)]
    acting = [_spread(map, plain.in_features, heads) for map in found_maps if map is not None]
    source = Compose(acting) if len(acting) > 1 else acting[0] if acting else None
    for map, width in ((source, plain.in_features), (target, plain.out_features)):
        if map is not None and map.size != width:
            raise InputError(f"The map at '{name}' has size {map.size}, the linear {width}.")
    return source, target


def _spread(map: Transform, width: int, heads: int) -> Transform:
    """The map of the values as the queries' heads share it; any other as it is."""
    return Repeat(map, width // map.size, heads) if map.size != width and width % map.size == 0 else map


def plain_linear(weight: Float[Tensor, "out n"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    """A frozen nn.Linear that holds these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
