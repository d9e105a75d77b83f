"""The parts of a live model that an `Arch` names, with their types."""

from torch import nn

from latmix.archs import Arch
from latmix.errors import InputError


def layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """The decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())


def linear(owner: nn.Module, path: str) -> nn.Linear:
    """Raises: LatmixError: something else stands there."""
    found = owner.get_submodule(path)
    if not isinstance(found, nn.Linear):
        raise InputError(f"'{path}' is a {type(found).__name__}, not a linear; is something attached already?")
    return found


def linears(model: nn.Module, arch: Arch) -> dict[str, nn.Linear]:
    """Every quantized linear by its path, in the order of computation."""
    every = enumerate(layers(model, arch))
    return {f"{arch.layers}.{i}.{name}": linear(layer, name) for i, layer in every for name in arch.linears}
