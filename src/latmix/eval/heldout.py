"""The held-out windows on their way through the layers of a model that is being quantized, one layer at a time.

They go along three times: through the original's layers, the folded ones and the quantized ones, each time on another
rank where there are several. At the end they meet the heads, on the first, and that is the measurement: no model ever
stands in memory as a whole. Large heads are gone through in pieces, some tokens at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latmix import ranks
from latmix.eval.activations import drawn, noted
from latmix.eval.errors import TOKENS, errors_of_layer
from latmix.eval.scores import Scores, Scoring
from latmix.model.attach import seen_by_head
from latmix.model.calibrate import BATCH, Arguments, forward
from latmix.model.maps import Maps
from latmix.model.source import Source
from latmix.model.states import States, embedded
from latmix.model.tensors import Tensors, rows
from latmix.numerics import BlockFormat
from latmix.progress import Progress

LOGITS = 2**25
"""Logits of one model in memory at a time: 128 MiB."""


@dataclass(frozen=True)
class Measured:
    """Attributes: float_change: KL of the folded model to the original, nothing rounded: what inexact maps cost."""

    scores: Scores
    float_change: float


class HeldOut:
    """The windows, in the layers of `source`. All of it does nothing where there are no windows.

    work: a folder for what goes along: three times 4 bytes for each hidden value.
    arguments: of each layer's forward.
    """

    def __init__(
        self,
        source: Source,
        maps: Maps,
        windows: Int[Tensor, "held_out window"],
        work: Path,
        arguments: list[Arguments],
    ) -> None:
        self.source, self.arch, self.maps, self.windows = source, source.arch, maps, windows
        self._arguments = arguments
        names = ("original", "folded", "quantized")
        self._here = {name for number, name in enumerate(names) if number % ranks.world() == ranks.rank()}
        self._streams = {name: States(work, name, windows.shape, source.config.hidden_size) for name in names}
        if not maps.each():
            del self._streams["folded"]  # the same as the original
        self._picks = drawn(windows.numel(), TOKENS, seed=0)

    @torch.no_grad()
    def begin(self, quantized: Tensors) -> None:
        """What enters the first layer; `quantized` holds the embedding in its new basis, as it will be served."""
        if not len(self.windows):
            return
        name = f"{self.arch.embedding}.weight"
        stream = self.maps.stream(self.arch)
        original = self.source.tensors.tensor(name)
        for key, states in self._streams.items():
            table = quantized.tensor(name) if key == "quantized" else original
            hidden = embedded(table, self.windows)
            moving = key == "folded" and stream is not None
            if key in self._here:
                states.put(0, (stream(batch) for batch in hidden) if moving else hidden)  # type: ignore[misc]

    @torch.no_grad()
    def original(self, layer: nn.Module, index: int, fmt: BlockFormat | None) -> dict[str, Any]:
        """Through the original layer, its gains absorbed; returns what rounding costs at each of its inputs."""
        if not len(self.windows) or "original" not in self._here:
            return {}
        with noted(layer, self.arch, self._picks) as seen:
            self._advance("original", layer, index)
        if fmt is None:
            return {}
        activations = {name: torch.cat(parts) for name, parts in seen.items()}
        heads = self.source.config.num_key_value_heads
        return errors_of_layer(layer, self.arch, self.maps, index, heads, activations, fmt)

    def folded(self, layer: nn.Module, index: int) -> None:
        """Through the folded layer, its online transforms in place, nothing rounded."""
        if "folded" in self._streams:
            self._advance("folded", layer, index)

    def quantized(self, layer: nn.Module, index: int) -> None:
        """Through the quantized layer."""
        self._advance("quantized", layer, index)

    def _advance(self, name: str, layer: nn.Module, index: int) -> None:
        if len(self.windows) and name in self._here:
            states = self._streams[name]
            states.put(index + 1, forward(layer, self._arguments[index], states.at(index)))

    def drop(self, index: int) -> None:
        """Forget what entered a layer."""
        for name, states in self._streams.items():
            if name in self._here:
                states.drop(index)

    @torch.no_grad()
    def measured(self, model: PreTrainedModel, quantized: Tensors, progress: Progress) -> Measured | None:
        """Cost: the three heads on every token. `model`: a skeleton; `quantized` holds the head, as it is served."""
        if not len(self.windows):
            return None
        head, gain = f"{self.arch.head}.weight", self.source.tensor(f"{self.arch.final_norm}.weight")
        bias = f"{self.arch.head}.bias"
        served = quantized.tensor(head)
        served_bias = quantized.tensor(bias).to(gain) if bias in quantized else None
        original = self.source.tensors.tensor(self.source.name(head))
        norm = model.get_submodule(self.arch.final_norm)
        norm.weight = nn.Parameter(torch.ones_like(gain), requires_grad=False)
        ours, floating = Scoring(self.windows), Scoring(self.windows)
        some = max(1, LOGITS // len(served))
        progress.stage("measure", sum(-(-batch[:, 1:].numel() // some) for batch in self.windows.split(BATCH)))
        for entering in self._entering(some):
            normed = {key: norm(hidden) for key, hidden in entering.items()}
            wanted = _logits(normed["original"] * gain, original)
            ours.add(_logits(normed["quantized"], served, served_bias), wanted)
            if "folded" in normed:
                stream = self.maps.stream(self.arch)
                back = normed["folded"] if stream is None else seen_by_head(stream).inverse(normed["folded"])
                floating.add(_logits(back * gain, original), wanted)
            progress.advance()
        change = floating.scores().kl if "folded" in self._streams else None
        return Measured(ours.scores(), change.mean if change else 0.0)

    def _entering(self, some: int) -> Iterator[Mapping[str, Float[Tensor, "tokens width"]]]:
        """What enters the final norm of each model, some tokens at a time, without the last of each window."""
        last = self.source.layers
        for batch in zip(*(states.at(last) for states in self._streams.values()), strict=True):
            tokens = [hidden[:, :-1].flatten(0, 1).split(some) for hidden in batch]
            for part in zip(*tokens, strict=True):
                yield dict(zip(self._streams, part, strict=True))


def _logits(
    hidden: Float[Tensor, "tokens width"], head: Tensor, bias: Tensor | None = None
) -> Float[Tensor, "tokens vocabulary"]:
    """`head` may lie in a mapped file, in any precision."""
    logits = torch.cat([F.linear(hidden, piece.to(hidden)) for piece in rows(head)], dim=-1)
    return logits if bias is None else logits + bias
