"""What the linears of a model see: activations by place, norm gains absorbed, nothing quantized.

A place is an input of a layer ("qkv/0"). A word names one or many: an input ("down": of every layer), a site
("residual": every input that reads the stream), either with a layer ("residual/3").
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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
    chosen = drawn(windows.numel(), tokens, seed)
    with ExitStack() as stack:
        each = [stack.enter_context(noted(layer, loaded.arch, chosen)) for layer in layers(loaded.model, loaded.arch)]
        for ids in windows.split(BATCH):
            loaded.model(ids.to(loaded.model.device), use_cache=False)
    return {Place(name, i): torch.cat(parts) for i, seen in enumerate(each) for name, parts in seen.items()}


def drawn(total: int, tokens: int, seed: int) -> Bool[Tensor, " total"]:
    """Which of `total` tokens are looked at: `tokens` of them, at random."""
    picks = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:tokens]
    return torch.zeros(total, dtype=torch.bool).index_fill_(0, picks, True)


@contextmanager
def noted(layer: nn.Module, arch: Arch, chosen: Bool[Tensor, " total"]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Within, a layer notes the chosen tokens' activations at each of its inputs, by the input's name; the windows pass
    through it once, in order."""
    seen: dict[str, list[Tensor]] = {spot.name: [] for spot in arch.inputs}
    passed = dict.fromkeys(seen, 0)

    def note(name: str, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        begin, passed[name] = passed[name], passed[name] + len(tokens)
        seen[name].append(tokens[chosen[begin : passed[name]].to(x.device)])
        return x

    hooks = [watch(layer, spot, partial(note, spot.name)) for spot in arch.inputs]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
