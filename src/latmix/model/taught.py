"""The calibration windows on their way through the layers of a model that is being quantized, one layer at a time.

They go through the quantized layers; for a quantizer that aims at the original's outputs, through the original's too.
Ranks share the windows.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor, nn

from latmix.archs import Input
from latmix.model.attach import linear_maps
from latmix.model.calibrate import Arguments, Moments, entering, forward, moments
from latmix.model.maps import Maps
from latmix.model.source import Source
from latmix.model.states import States, embedded
from latmix.model.tensors import Tensors
from latmix.weights import WeightQuantizer


class Taught:
    """The windows, in the layers of `source`. All of it does nothing where the quantizer needs no moments.

    work: a folder for what goes along: 4 bytes for each hidden value, once or twice.
    arguments: of each layer's forward.
    """

    def __init__(
        self,
        source: Source,
        maps: Maps,
        windows: Int[Tensor, "windows window"],
        quantizer: WeightQuantizer,
        work: Path,
        arguments: list[Arguments],
    ) -> None:
        self.source, self.arch, self.maps, self.windows = source, source.arch, maps, windows
        self._needed, self._aims, self._arguments = quantizer.needs_hessian, quantizer.needs_cross, arguments
        shape, width = windows.shape, source.config.hidden_size
        self._quantized = States(work, "taught", shape, width, shared=True)
        self._untouched = States(work, "untouched", shape, width, shared=True)
        self._original: nn.Module | None = None

    def begin(self, quantized: Tensors) -> None:
        """What enters the first layer; `quantized` holds the embedding in its new basis, as it will be served."""
        name = f"{self.arch.embedding}.weight"
        if self._needed:
            self._quantized.put(0, embedded(quantized.tensor(name), self.windows[self._quantized.share]))
        if self._aims:
            table = self.source.tensors.tensor(name)
            self._untouched.put(0, embedded(table, self.windows[self._untouched.share]))

    def meet(self, original: nn.Module) -> None:
        """The next layer as it was, its gains absorbed; a copy stays until the windows are through."""
        self._original = copy.deepcopy(original) if self._aims else None

    def moments(self, layer: nn.Module, index: int) -> Callable[[Input], Moments] | None:
        """Of the inputs of the folded layer as it is when asked; None where none are needed."""

        def seen(spot: Input) -> Moments:
            aims = None if self._original is None else self._wanted(self._original, index, spot)
            return moments(layer, self._arguments[index], self._quantized.at(index), spot, aims)

        return seen if self._needed else None

    def _wanted(self, original: nn.Module, index: int, spot: Input) -> Iterator[Float[Tensor, "tokens n"]]:
        """What the original reads at an input, in the basis of the folded layer's readers."""
        heads = self.source.config.num_key_value_heads
        map, _ = linear_maps(self.arch, self.maps, original, spot.readers[0], index, heads)
        for y in entering(original, self._arguments[index], self._untouched.at(index), spot):
            yield y if map is None else map(y)

    def advance(self, layer: nn.Module, index: int) -> None:
        """Through the quantized layer, and the original one."""
        for states, through in ((self._quantized, layer if self._needed else None), (self._untouched, self._original)):
            if through is not None:
                states.put(index + 1, forward(through, self._arguments[index], states.at(index)))
        self._original = None

    def drop(self, index: int) -> None:
        """Forget what entered a layer."""
        self._quantized.drop(index)
        self._untouched.drop(index)
