"""What is still free once the weights are quantized: everything that inference computes anyway.

Biases, norm gains, embedding and head are stored in bfloat16 and cost nothing to change. Codes are free in another
sense: GPTQ chose each to serve its own layer, and a neighbour may serve the model better (`model.latent`). `free` makes
the chosen parts of a quantized model learnable, in place, layer by layer: where there are several ranks, each layer,
the embedding and the head are sharded over them with all that learns in it, and no rank ever holds another whole layer.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from latmix import sharding
from latmix.archs import Arch
from latmix.errors import InputError
from latmix.model.latent import Latent
from latmix.model.parts import layers, linear
from latmix.numerics import Quantized
from latmix.progress import Progress
from latmix.recipe import Tuning

KEPT = ("gains", "embedding", "head")
"""Parts that keep their full precision, by the word in a recipe."""

LEARNING, LIMITS = 5, 2
"""Numbers held between steps for each weight that learns: its value, gradient, best value and Adam's moments, an
average aside; and what more for a latent."""


def numbers_held(tuning: Tuning) -> tuple[int, float]:
    """Numbers held between steps for each weight of a layer, and of embedding and head on average."""
    tables, learning = sum(part in tuning.kept for part in ("embedding", "head")), LEARNING + tuning.average
    return learning + LIMITS if tuning.codes else 1, 1 + (learning - 1) * tables / 2


Filled = tuple[Mapping[str, Quantized], Mapping[str, Tensor]]
"""Of a layer, by linear: codes, and what they were rounded from."""


class Free(nn.Module):
    """The learnable parts of a quantized model, by kind; the model borrows them.

    kept: their paths. movable: the linears whose codes are free, by path.
    """

    def __init__(self, model: PreTrainedModel, kept: list[str], movable: list[str]) -> None:
        super().__init__()
        latents = {path: _latent(model.get_submodule(path)) for path in movable}
        self.kept = nn.ParameterDict({_key(name): model.get_parameter(name) for name in kept})
        self.latents = nn.ParameterDict({_key(path): values for path, (_, values) in latents.items()})
        self._movable = {path: latent for path, (latent, _) in latents.items()}  # a plain dict: they are the model's

    @torch.no_grad()
    def constrain(self, damping: float) -> None:
        """Codes move to their neighbours and no further; latents go back to their codes, by that share of the way."""
        for latent, values in self._each().values():
            latent.constrain_(sharding.held(values), damping)

    @torch.no_grad()
    def settled(self, path: str) -> dict[str, Quantized]:
        """The codes of the linears below a path whose codes were free, by what follows it. All ranks ask alike."""
        found = {name: each for name, each in self._each().items() if name.startswith(f"{path}.")}
        return {
            name.removeprefix(f"{path}."): latent.settled(sharding.whole(values))
            for name, (latent, values) in found.items()
        }

    def _each(self) -> dict[str, tuple[Latent, Tensor]]:
        return {path: (latent, self.latents[_key(path)]) for path, latent in self._movable.items()}


def free(
    model: PreTrainedModel,
    arch: Arch,
    fill: Callable[[int], Filled],
    tuning: Tuning,
    progress: Progress,
    offload: bool = False,
) -> Free:
    """Make parts of a quantized model learnable, in place: those in `tuning.kept` (the head's bias, where the maps gave
    it one, belongs to the head), a bias of the readers of each input in `tuning.biases` (zero where they had none), and
    with `tuning.codes` the codes.

    fill: puts the weights of the layer of that number into the model; the rest is there.
    progress: told of every layer.
    offload: what they hold and learn, with gradients and Adam's moments, waits in the CPU's memory (`sharding.shard`).

    Raises: LatmixError: an unknown part or input; lists the known.
    """
    if unknown := [part for part in tuning.kept if part not in KEPT]:
        raise InputError(f"Unknown part '{unknown[0]}' in tuning.kept; known: {', '.join(KEPT)}.")
    owners = {"embedding": (arch.embedding,), "head": (arch.head,), "gains": (arch.final_norm,)}
    kept = [name for part in tuning.kept for path in owners[part] for name in _thaw_all(model, path)]
    norms = [spot.norm for spot in arch.inputs if spot.norm is not None] if "gains" in tuning.kept else []
    for path in (arch.embedding, arch.head):
        sharding.shard(model.get_submodule(path), offload)
    readers = [reader for name in tuning.biases for reader in arch.input(name).readers]
    movable: list[str] = []
    every = layers(model, arch)
    progress.stage("free", len(every))
    for index, layer in enumerate(every):
        path, (quantized, unrounded) = f"{arch.layers}.{index}", fill(index)
        kept += [f"{path}.{name}" for norm in norms for name in _thaw_all(layer, norm)]
        kept += [f"{path}.{name}" for name in _loosen_biases(layer, [name for name in arch.linears if name in readers])]
        for name in arch.linears if tuning.codes else ():
            place = linear(layer, name)
            place.weight = nn.Parameter(unrounded[name].clone())
            register_parametrization(place, "weight", Latent(quantized[name]))
            movable.append(f"{path}.{name}")
        sharding.shard(layer, offload)
        for name in arch.linears if tuning.codes else ():
            latent, values = _latent(layer.get_submodule(name))
            latent.part(sharding.held(values).device)
        progress.advance()
    sharding.join_layers(model.base_model)
    return Free(model, kept, movable)


def _loosen_biases(layer: nn.Module, names: list[str]) -> list[str]:
    for name in names:
        place = linear(layer, name)
        if place.bias is None:
            place.bias = nn.Parameter(place.weight.new_zeros(place.out_features), requires_grad=False)
        _thaw(place, "bias")
    return [f"{name}.bias" for name in names]


def _latent(place: nn.Module) -> tuple[Latent, nn.Parameter]:
    """The parametrization of its weight, and what learns under it."""
    latent = place.get_submodule("parametrizations.weight.0")
    assert isinstance(latent, Latent)
    return latent, place.get_parameter("parametrizations.weight.original")


def _key(path: str) -> str:
    return path.replace(".", "/")  # no dots in the names of parameters


def _thaw_all(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        _thaw(module, name)
    return [f"{path}.{name}" for name in names]


def _thaw(module: nn.Module, name: str) -> None:
    """A learnable copy in the tensor's place: other models may share the old one."""
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
