"""Maps that are found in closed form, from the second moments of the activations they stand at.

Given up: moments of the model as it is when the layers before are quantized. They are the unquantized model's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from latmix.archs import Arch, Input
from latmix.errors import InputError
from latmix.model.calibrate import forward, layer_arguments, moments
from latmix.model.fold import absorb_layer
from latmix.model.maps import Maps
from latmix.model.parts import layers, linear
from latmix.model.source import Source
from latmix.model.states import States, embedded
from latmix.progress import Progress
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


@torch.no_grad()
def fit_maps(source: Source, maps: Maps, taught: Int[Tensor, "learn window"], work: Path, progress: Progress) -> None:
    """Fit every online map that is fitted, in place: a pass over the layers of the unquantized model, one in memory.
    Ranks share the windows.

    Cost: a (partial) forward of each layer for each input with such a map; nothing where there is none.
    Raises: LatmixError: a folded map changes the basis that a fitted one reads, or a full disk.
    """
    if not any(fitted(maps, source.arch, index) for index in range(source.layers)):
        return
    model = source.skeleton()
    arguments = layer_arguments(model, source.arch, taught.shape[1])
    states = States(work, "fit", taught.shape, source.config.hidden_size, shared=True)
    states.put(0, embedded(source.tensors.tensor(f"{source.arch.embedding}.weight"), taught[states.share]))
    progress.stage("fit", source.layers)
    for index, layer in enumerate(layers(model, source.arch)):
        with source.filled(layer, f"{source.arch.layers}.{index}"):
            absorb_layer(layer, source.arch)
            seen = partial(moments, layer, arguments[index])
            fit(maps, source.arch, index, layer, lambda spot: seen(states.at(index), spot).hessian)  # noqa: B023
            states.put(index + 1, forward(layer, arguments[index], states.at(index)))
        states.drop(index)
        progress.advance(f"layer {index}")
    states.drop(source.layers)
