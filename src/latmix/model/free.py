"""What is still free once the weights are quantized: everything that inference computes anyway.

Biases, norm gains, embedding and head are stored in bfloat16 and cost nothing to change. Codes and scales are free in
another sense: GPTQ chose each to serve its own layer, and a neighbour may serve the model better (`model.latent`).
`free` makes the chosen parts of a quantized model learnable, in place; `Free.settle` makes it plain again.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.errors import InputError
from latmix.model.latent import Latent
from latmix.model.parts import layers, linear
from latmix.numerics import Quantized

KEPT = ("gains", "embedding", "head")
"""Parts that keep their full precision, by the word in a recipe."""


class Free(nn.Module):
    """The learnable parts of a quantized model, by kind; the model borrows them."""

    def __init__(self, kept: Mapping[str, nn.Parameter], movable: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.kept = nn.ParameterDict({_key(name): parameter for name, parameter in kept.items()})
        self.latents = nn.ParameterDict({_key(path): _latent(place)[1] for path, place in movable.items()})
        self.exponents = nn.ParameterDict({_key(path): _latent(place)[2] for path, place in movable.items()})
        self._movable = dict(movable)  # a plain dict: these are the model's modules

    @torch.no_grad()
    def clamp(self) -> None:
        """Codes move to their neighbours, scales by one power of two, and no further."""
        for place in self._movable.values():
            latent, *parameters = _latent(place)
            latent.clamp_(*parameters)

    @torch.no_grad()
    def settle(self) -> dict[str, Quantized]:
        """Make the model plain again, and return the codes of the linears whose codes were free, by path."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        settled: dict[str, Quantized] = {}
        for path, place in self._movable.items():
            latent, *parameters = _latent(place)
            settled[path] = latent.settled(*parameters)
            remove_parametrizations(place, "weight", leave_parametrized=True)
            place.weight.requires_grad_(False)
        return settled


def free(
    model: PreTrainedModel,
    arch: Arch,
    quantized: Mapping[str, Quantized],
    kept: tuple[str, ...],
    biases: tuple[str, ...],
    unrounded: Mapping[str, Tensor],
) -> Free:
    """Make parts of a quantized model learnable, in place.

    Args:
        kept: of `KEPT`. The head's bias, where the maps gave it one, belongs to the head.
        biases: inputs of the architecture whose readers get a bias to learn (zero where they had none).
        unrounded: by path, what the weights were rounded from: their codes and scales may move.

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
            if path in unrounded:
                place.weight = nn.Parameter(unrounded[path].clone())
                register_parametrization(place, "weight", Latent(quantized[path]))
                movable[path] = place
    return Free(parameters, movable)


def _owners(model: PreTrainedModel, arch: Arch, part: str) -> list[str]:
    """Paths of the modules whose parameters a part consists of."""
    if part == "gains":
        norms = [spot.norm for spot in arch.inputs if spot.norm is not None]
        return [
            *(f"{arch.layers}.{i}.{norm}" for i in range(len(layers(model, arch))) for norm in norms),
            arch.final_norm,
        ]
    return [{"embedding": arch.embedding, "head": arch.head}[part]]


def _latent(place: nn.Linear) -> tuple[Latent, nn.Parameter, nn.Parameter]:
    """The parametrization of its weight, and what learns under it: latents and exponents."""
    owner = "parametrizations.weight"
    latent = place.get_submodule(f"{owner}.0")
    assert isinstance(latent, Latent)
    return latent, place.get_parameter(f"{owner}.original0"), place.get_parameter(f"{owner}.original1")


def _key(path: str) -> str:
    return path.replace(".", "/")  # no dots in the names of parameters


def _thaw(module: nn.Module, name: str) -> nn.Parameter:
    """A learnable copy in the tensor's place: other models may share the old one."""
    copy = nn.Parameter(getattr(module, name).detach().clone())
    setattr(module, name, copy)
    return copy
