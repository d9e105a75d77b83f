"""E(T), the error that a map leaves: E(T) = E‖x − T⁻¹(Q(T(x)))‖² / d, and its share E_B(T) in every block of x.

The error is taken in the original basis, where maps can be compared: a map that amplifies its output has to pay when it
is undone. The blocks of E_B are those of x, whatever T did to them, so their mean is E(T).
"""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latmix.archs import Arch
from latmix.eval.activations import Place
from latmix.model.attach import linear_maps
from latmix.model.maps import Maps
from latmix.numerics import BlockFormat, fake_quant
from latmix.numerics.scales import to_blocks
from latmix.transforms import Transform, evaluated_once

TOKENS = 2048  # enough for a mean, at every place of a run

BATCH = 256  # tokens at a time


@torch.no_grad()
def block_errors(map: Transform | None, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Float[Tensor, " blocks"]:
    """E_B(T): mean squared error per element in each block of x (float64); `map` None is the identity."""
    total = torch.zeros(x.shape[-1], dtype=torch.float64, device=x.device)
    with nullcontext() if map is None else evaluated_once(map):
        for part in x.split(BATCH):
            total += (through(map, part, fmt) - part).double().square().sum(0)
    return _means(total / len(x), fmt)


def _means(values: Float[Tensor, " n"], fmt: BlockFormat) -> Float[Tensor, " blocks"]:
    """Mean in each block; a partial last one is smaller."""
    return to_blocks(values, fmt.block).sum(-1) / to_blocks(torch.ones_like(values), fmt.block).sum(-1)


def error(map: Transform | None, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> float:
    """E(T). Blocks count by their size."""
    per_block = block_errors(map, x, fmt)
    sizes = to_blocks(torch.ones_like(x[0], dtype=torch.float64), fmt.block).sum(-1)
    return float((per_block * sizes).sum() / sizes.sum())


@torch.no_grad()
def through(map: Transform | None, x: Float[Tensor, "*batch n"], fmt: BlockFormat) -> Float[Tensor, "*batch n"]:
    """T⁻¹(Q(T(x))): what becomes of an activation."""
    if map is None:
        return fake_quant(x, fmt)
    with evaluated_once(map):
        back: Tensor = map.inverse(fake_quant(map(x), fmt))
    return back


@torch.no_grad()
def errors_of_layer(
    layer: nn.Module,
    arch: Arch,
    maps: Maps,
    index: int,
    heads: int,
    activations: Mapping[str, Float[Tensor, "tokens n"]],
    fmt: BlockFormat,
) -> dict[str, dict[str, list[float]]]:
    """At every input of a layer: E_B relative to the mean square of the activation, without a map ("before") and with
    the run's ("after").

    A map of the stream acts before the norm, which divides its shift by another number at every token; there the linear
    part alone is taken. Cost: one inverse of each map per place.

    Args:
        layer: plain, its norm gains absorbed.
        heads: KV heads.
        activations: by input, of the unquantized model whose norm gains have been absorbed.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, x in activations.items():
        reader = arch.input(name).readers[0]
        map, _ = linear_maps(arch, maps, layer, reader, index, heads)
        stream = any(site.stream for site in arch.sources(reader))
        rounded = fake_quant(x, fmt)
        after = rounded
        if map is not None and stream:
            after = map.solve(fake_quant(map.linear(x), fmt))
        elif map is not None:
            after = map.inverse(fake_quant(map(x), fmt))
        energy = x.double().square().mean()
        both = {"before": rounded, "after": after}
        found[str(Place(name, index))] = {
            key: (_means((value - x).double().square().mean(0), fmt) / energy).tolist() for key, value in both.items()
        }
    return found
