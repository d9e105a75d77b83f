"""What the linears of a model see: activations by place, norm gains absorbed, nothing quantized.

A place is an input of a layer ("qkv/0"). A word names one or many: an input ("down": of every layer), a site
("residual": every input that reads the stream), either with a layer ("residual/3").
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latmix.archs import Arch
from latmix.errors import InputError
from latmix.model.inputs import watch
from latmix.model.load import Loaded
from latmix.model.parts import layers

BATCH = 8  # windows in one forward


@dataclass(frozen=True)
class Place:
    """One input of one layer."""

    input: str
    layer: int

    def __str__(self) -> str:
        return f"{self.input}/{self.layer}"


def places(arch: Arch, count: int, word: str) -> list[Place]:
    """The places that `word` names, in a model of `count` layers.

    Raises: LatmixError: neither site nor input, or no such layer.
    """
    name, slash, layer = word.partition("/")
    sites = {site.name: site for site in arch.sites}
    inputs = [spot.name for spot in arch.inputs]
    if name in sites:
        inputs = [spot.name for spot in arch.inputs if set(spot.readers) <= set(sites[name].readers)]
    elif name in inputs:
        inputs = [name]
    else:
        raise InputError(f"Unknown site or input '{name}'; known: {', '.join([*sites, *inputs])}.")
    if slash and layer not in map(str, range(count)):
        raise InputError(f"'{word}' names no layer; this model has layers 0 to {count - 1}.")
    chosen = [int(layer)] if slash else range(count)
    return [Place(input, index) for index in chosen for input in inputs]


@torch.no_grad()
def collect(
    loaded: Loaded, windows: Int[Tensor, "windows window"], tokens: int, seed: int
) -> Mapping[Place, Float[Tensor, "tokens n"]]:
    """Up to `tokens` activations at every place, the same tokens everywhere, drawn at random. The norm gains of the
    model must have been absorbed.

    Cost: one forward of the model; `tokens` times the width of every input in memory.
    """
    total = windows.numel()
    picks = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: min(tokens, total)].sort().values
    seen: dict[Place, list[Tensor]] = {}
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[picks] = True
    now = chosen[:0]
    hooks = []

    def note(place: Place, x: Tensor) -> Tensor:
        seen.setdefault(place, []).append(x.flatten(0, -2)[now.to(x.device)])
        return x

    for index, layer in enumerate(layers(loaded.model, loaded.arch)):
        for spot in loaded.arch.inputs:
            hooks.append(watch(layer, spot, lambda x, place=Place(spot.name, index): note(place, x)))  # type: ignore[misc]
    try:
        for ids, mask in zip(windows.split(BATCH), chosen.view(windows.shape).split(BATCH), strict=True):
            now = mask.flatten()
            loaded.model(ids.to(loaded.model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {place: torch.cat(parts) for place, parts in seen.items()}
