"""What a run answers, computed with one decoder layer in memory.

A pass reads the run's files once: each layer is decoded, everything that was asked goes through it, it is forgotten.
Cost of a pass: every weight decoded to float32 once, and the hidden states in memory. Given up: a cache of keys and
values; a greedy token costs a pass, whatever came before it.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from latmix.export.source import PACKED, SCALE, Source
from latmix.model.attach import plain_linear
from latmix.model.calibrate import forward, layer_arguments
from latmix.model.inputs import quantize_layer_inputs
from latmix.model.parts import layers, linear
from latmix.model.source import empty, pick_device, read_config, skeleton
from latmix.model.states import embedded
from latmix.model.tensors import rows
from latmix.numerics import Quantized, decode, unpack
from latmix.progress import Progress

Asked = tuple[Int[Tensor, "windows tokens"], bool]
"""Token ids, and whether activations are rounded as in the run or left alone."""


class Streamed:
    """The model of a run, of which no more than a layer is ever there. progress: told of every layer of a pass."""

    def __init__(self, source: Source, progress: Progress | None = None) -> None:
        self.source, self.arch, self._progress = source, source.arch, progress or Progress()
        self.model = skeleton(source.path, read_config(source.path))
        self.maps = source.maps.to(pick_device())

    @torch.no_grad()
    def hidden(self, *asked: Asked) -> list[Float[Tensor, "windows tokens width"]]:
        """What the head reads, for each thing asked, in one pass. Raises: DamagedError: a tensor cannot be read."""
        table = self.source.tensor(f"{self.arch.embedding}.weight")
        streams = [list(embedded(table, ids)) for ids, _ in asked]
        arguments = [layer_arguments(self.model, self.arch, ids.shape[1]) for ids, _ in asked]
        for index, layer in enumerate(layers(self.model, self.arch)):
            self._fill(layer, f"{self.arch.layers}.{index}")
            inputs = quantize_layer_inputs(layer, self.arch, self.maps, index, self.source.layout.activations)
            for place, (_, rounded) in enumerate(asked):
                for quantizer in inputs.quantizers:
                    quantizer.active = rounded
                streams[place] = list(forward(layer, arguments[place][index], streams[place]))
            inputs.remove()
            empty(layer)
            self._progress.advance()
        norm = self.model.get_submodule(self.arch.final_norm)
        self._parameters(norm, self.arch.final_norm)
        return [norm(torch.cat(batches)) for batches in streams]

    @torch.no_grad()
    def logprobs(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocabulary"]:
        """The head on some tokens. Its weight stays in its file but for a few rows at a time."""
        weight, bias = self.source.tensor(f"{self.arch.head}.weight"), f"{self.arch.head}.bias"
        logits = torch.cat([F.linear(hidden, piece.to(hidden)) for piece in rows(weight)], dim=-1)
        logits = logits + self.source.tensor(bias).to(hidden) if bias in self.source.shapes else logits
        return logits.log_softmax(-1).cpu()

    def greedy(self, prompt: Int[Tensor, " prompt"], tokens: int) -> Iterator[int]:
        """Cost: a pass for each token."""
        ids = prompt
        for _ in range(tokens):
            (hidden,) = self.hidden((ids.unsqueeze(0), True))
            following = self.logprobs(hidden[0, -1:]).argmax(-1)
            yield int(following)
            ids = torch.cat([ids, following])

    def _fill(self, layer: nn.Module, path: str) -> None:
        fmt, device = self.source.layout.weights, pick_device()
        for name in self.arch.linears:
            place, width = f"{path}.{name}", linear(layer, name).in_features
            codes = unpack(self.source.tensor(place + PACKED), fmt.element.bits, width)
            tensor_scale = self._optional(f"{place}.weight_global_scale")
            weight = decode(Quantized(codes, self.source.tensor(place + SCALE), tensor_scale, fmt, torch.float32))
            bias = self._optional(f"{place}.bias")
            found = plain_linear(weight, None if bias is None else bias.float())
            layer.set_submodule(name, found.to(device))
        self._parameters(layer, path)

    def _parameters(self, module: nn.Module, path: str) -> None:
        """Those that are not there yet."""
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                owner, _, attribute = name.rpartition(".")
                value = self.source.tensor(f"{path}.{name}").to(pick_device(), torch.float32, copy=True)
                setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))

    def _optional(self, name: str) -> Tensor | None:
        return self.source.tensor(name) if name in self.source.shapes else None
