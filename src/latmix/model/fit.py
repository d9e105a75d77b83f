"""Maps that are found in closed form, from the second moments of the activations they stand at.

Given up: moments of the model as it is when the layers before are quantized. They are the unquantized model's.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.archs import Arch, Input
from latmix.errors import InputError
from latmix.model.maps import Maps
from latmix.model.parts import linear
from latmix.transforms import Wush


def fitted(maps: Maps, arch: Arch, index: int) -> list[tuple[Input, Wush]]:
    """The inputs of a layer where a map stands that is fitted.

    Raises: InputError: a folded map changes the basis that one of them reads.
    """
    found = [(spot, map) for spot in arch.inputs if isinstance(map := maps.online(spot.name, index), Wush)]
    for spot, _ in found:
        for site in arch.sources(spot.readers[0]):
            if maps.folded(site.name, index) is not None:
                raise InputError(f"A fitted map at '{spot.name}' needs its basis as it is; remove folded.{site.name}.")
    return found


@torch.no_grad()
def fit(maps: Maps, arch: Arch, index: int, layer: nn.Module, moment: Callable[[Input], Float[Tensor, "n n"]]) -> None:
    """Fit the online maps of one layer, in place. The layer is unquantized, its gains absorbed, no map attached.

    moment: mean of x xᵀ at an input of the layer. Cost: a (partial) forward of the layer for each fitted input.
    """
    for spot, map in fitted(maps, arch, index):
        map.fit(moment(spot), metric(layer, spot))


def metric(layer: nn.Module, spot: Input) -> Float[Tensor, "n n"]:
    """Σ WᵀW over the readers: how much a unit error at this input costs in their outputs."""
    weights = torch.cat([linear(layer, name).weight for name in spot.readers])
    return weights.T @ weights
