"""Maps that are found in closed form, from the second moments of the activations they stand at.

Given up: moments of the model as it is when the layers before are quantized. They are the unquantized model's.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.archs import Arch, Input
from latmix.errors import LatmixError
from latmix.model.calibrate import Stream
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear
from latmix.transforms import Wush


@torch.no_grad()
def fit(maps: Maps, model: PreTrainedModel, arch: Arch, windows: Int[Tensor, "windows window"]) -> None:
    """Fit every online map that is fitted, in place. `model` is unquantized, its gains absorbed, no maps attached.

    Cost: a (partial) forward of each layer for each input with such a map; nothing where there is none.
    Raises: LatmixError: a folded map changes the basis that a fitted one reads.
    """
    fitted = [
        (index, spot) for index in range(len(layers(model, arch))) for spot in arch.inputs if _at(maps, spot, index)
    ]
    if not fitted:
        return
    stream = Stream(model, arch, windows)
    for index, layer in enumerate(layers(model, arch)):
        for spot in (spot for i, spot in fitted if i == index):
            for site in arch.sources(spot.readers[0]):
                if maps.folded(site.name, index) is not None:
                    raise LatmixError(
                        f"A fitted map at '{spot.name}' needs its basis as it is; remove folded.{site.name}."
                    )
            found = _at(maps, spot, index)
            assert found is not None
            found.fit(stream.hessian(index, spot), metric(layer, spot))
        stream.advance(index)


def metric(layer: nn.Module, spot: Input) -> Float[Tensor, "n n"]:
    """Σ WᵀW over the readers: how much a unit error at this input costs in their outputs."""
    weights = torch.cat([linear(layer, name).weight for name in spot.readers])
    return weights.T @ weights


def _at(maps: Maps, spot: Input, index: int) -> Wush | None:
    found = maps.online(spot.name, index)
    return found if isinstance(found, Wush) else None
