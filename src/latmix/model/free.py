"""What is still free once the weights are quantized: everything that inference computes anyway.

Biases, norm gains, embedding and head are stored in bfloat16 and cost nothing to change. Codes are free in another
sense: GPTQ chose each to serve its own layer, and a neighbour on the grid, under the same scale, may serve the model
better. `free` makes the chosen parts of a quantized model learnable, in place; `Free.settle` makes it plain again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.errors import InputError
from latmix.model.parts import layers, linear
from latmix.numerics import Quantized, decode_scales, encode, neighbours

KEPT = ("gains", "embedding", "head")
"""Parts that keep their full precision, by the word in a recipe."""


class Moves(nn.Module):
    """Parametrization of a quantized weight by moves in [-1, 1], rounded to -1, 0 or 1 steps along the grid.

    The gradient passes the rounding straight through, with half the distance between the neighbours as slope.
    Memory: four times the weight.
    """

    below: Tensor
    weight: Tensor
    above: Tensor

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        for name, values in zip(("below", "weight", "above"), neighbours(quantized), strict=True):
            self.register_buffer(name, values.float(), persistent=False)

    def right_inverse(self, weight: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        """No code has moved yet."""
        return torch.zeros_like(weight)

    def forward(self, move: Float[Tensor, "out n"]) -> Float[Tensor, "out n"]:
        moved: Tensor = _Move.apply(move, self.below, self.weight, self.above)  # type: ignore[no-untyped-call]
        return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, move: Tensor, below: Tensor, weight: Tensor, above: Tensor) -> Tensor:
        ctx.save_for_backward(below, above)
        return torch.where(move > 0.5, above, torch.where(move < -0.5, below, weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        below, above = ctx.saved_tensors
        return gradient * (above - below) * 0.5, None, None, None


class Free(nn.Module):
    """The learnable parts of a quantized model, by kind; the model borrows them."""

    def __init__(
        self, kept: Mapping[str, nn.Parameter], movable: Mapping[str, nn.Linear], quantized: Mapping[str, Quantized]
    ) -> None:
        super().__init__()
        moves = {path: _move(place) for path, place in movable.items()}
        self.kept = nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in kept.items()})
        self.moves = nn.ParameterDict({path.replace(".", "/"): move for path, move in moves.items()})
        self._movable, self._quantized = dict(movable), quantized  # a plain dict: these are the model's modules

    @torch.no_grad()
    def clamp(self) -> None:
        """Codes move to their neighbours and no further."""
        for move in self.moves.values():
            move.clamp_(-1.0, 1.0)

    @torch.no_grad()
    def settle(self) -> dict[str, Quantized]:
        """Make the model plain again, and return the codes of the linears whose codes were free, by path."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        settled: dict[str, Quantized] = {}
        for path, place in self._movable.items():
            remove_parametrizations(place, "weight", leave_parametrized=True)
            old = self._quantized[path]
            scales = decode_scales(old.scales, old.format, old.tensor_scale)
            settled[path] = encode(place.weight, old.format, scales, old.tensor_scale)
            place.weight.requires_grad_(False)
        return settled


def free(
    model: PreTrainedModel,
    arch: Arch,
    quantized: Mapping[str, Quantized],
    kept: tuple[str, ...],
    biases: tuple[str, ...],
    codes: bool,
) -> Free:
    """Make parts of a quantized model learnable, in place.

    Args:
        kept: of `KEPT`. The head's bias, where the maps gave it one, belongs to the head.
        biases: inputs of the architecture whose readers get a bias to learn (zero where they had none).
        codes: let every code move to a neighbour.

    Raises: LatmixError: an unknown part or input; lists the known.
    """
    if unknown := [part for part in kept if part not in KEPT]:
        raise InputError(f"Unknown part '{unknown[0]}' in tuning.kept; known: {', '.join(KEPT)}.")
    parameters: dict[str, nn.Parameter] = {}
    for part in kept:
        for owner in _owners(model, arch, part):
            module = model.get_submodule(owner)
            parameters |= {f"{owner}.{name}": _thaw(module, name) for name, _ in list(module.named_parameters())}
    readers = [reader for name in biases for reader in arch.input(name).readers]
    movable: dict[str, nn.Linear] = {}
    for index, layer in enumerate(layers(model, arch)):
        for name in arch.linears:
            place, path = linear(layer, name), f"{arch.layers}.{index}.{name}"
            if name in readers:
                if place.bias is None:
                    place.bias = nn.Parameter(place.weight.new_zeros(place.out_features), requires_grad=False)
                parameters[f"{path}.bias"] = _thaw(place, "bias")
            if codes:
                _thaw(place, "weight")  # parametrizing works in place
                register_parametrization(place, "weight", Moves(quantized[path]))
                _move(place).requires_grad_(True)
                movable[path] = place
    return Free(parameters, movable, quantized)


def _owners(model: PreTrainedModel, arch: Arch, part: str) -> list[str]:
    """Paths of the modules whose parameters a part consists of."""
    if part == "gains":
        norms = [spot.norm for spot in arch.inputs if spot.norm is not None]
        return [
            *(f"{arch.layers}.{i}.{norm}" for i in range(len(layers(model, arch))) for norm in norms),
            arch.final_norm,
        ]
    return [{"embedding": arch.embedding, "head": arch.head}[part]]


def _move(place: nn.Linear) -> nn.Parameter:
    """What learns under the parametrization of its weight."""
    move: nn.Parameter = place.get_parameter("parametrizations.weight.original")
    return move


def _thaw(module: nn.Module, name: str) -> nn.Parameter:
    """A learnable copy in the tensor's place: other models may share the old one."""
    copy = nn.Parameter(getattr(module, name).detach().clone())
    setattr(module, name, copy)
    return copy
