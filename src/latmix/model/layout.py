"""What a live model asks of an engine, before any map is attached."""

from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.model.parts import layers, linear
from latmix.numerics import parse_format
from latmix.recipe import Recipe
from latmix.targets import HEAD, Layout, sliding


def layout_of(model: PreTrainedModel, arch: Arch, recipe: Recipe) -> Layout:
    """The model's own biases and widths; formats and online transforms of the recipe."""
    linears = {name: linear(layer, name) for layer in layers(model, arch) for name in arch.linears}
    own = {name for name, found in linears.items() if found.bias is not None}
    head = {HEAD} if linear(model, arch.head).bias is not None else set()
    return Layout(
        arch,
        parse_format(recipe.weights),
        parse_format(recipe.activations),
        {name: found.in_features for name, found in linears.items()},
        frozenset(own | head),
        recipe.online,
        sliding(model.config.to_dict()),
    )
