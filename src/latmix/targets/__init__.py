"""What the engines that serve a model can express: known before anything is learned, and asked again by the export.

An engine takes a fixed architecture: a bias where it has a slot for one, an online transform where it has a place for
one, the formats it has arithmetic for. `Layout` is what a run asks for; a `Target` answers with `Refusal`s, each with
its reason and the recipe settings that avoid it. `fit` applies those settings before learning (`--set target=…`), so
that what is learned is what can be served; but not to formats, which are what the user asked for: there it refuses, as
the export always does. No torch here: a layout is words.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from latmix.archs import Arch
from latmix.errors import InputError
from latmix.recipe import Recipe, override
from latmix.registry import Registry, parse_spec
from latmix.targets.layout import (
    ATTENTION,
    HEAD,
    MLP,
    Layout,
    expected,
    expected_biases,
    family,
    respelled,
    sliding,
)
from latmix.targets.rules import (
    STATIC,
    Refusal,
    activation_refusals,
    avoiding,
    bias_refusals,
    online_refusals,
    weight_refusals,
)

FORMATS = {"weights", "activations"}  # recipe keys
FIXED = ("hadamard", "block-hadamard")  # online transforms without anything to learn
COMPRESSED = {"mxfp4": "mxfp4:scale=even", "mxfp8_e4m3": "mxfp8_e4m3:scale=rceil", "nvfp4": STATIC}
"""Formats of compressed-tensors' linears, and how its engines round activations beside them, as latmix can; the
tensor-wide scale of NVFP4 may be another one, if it is fixed."""


@dataclass(frozen=True)
class Target:
    """An export format and the engine it is for. `refusals` takes a layout and the recipe that led to it."""

    name: str
    about: str
    refusals: Callable[[Layout, Recipe], list[Refusal]]


TARGETS: Registry[Target] = Registry("target")


def fit(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe changed until its target can serve it; as it is where it names no target.

    Raises: InputError: unknown target, or one that lacks a format, or no setting helps; gives the reason.
    """
    if recipe.target is None:
        return recipe
    target = TARGETS[recipe.target]
    while refusals := target.refusals(expected(recipe, layout), recipe):
        if refusals[0].settings.keys() <= FORMATS:
            raise InputError(f"The target '{target.name}' cannot serve this: {refusals[0]}.")
        recipe = override(recipe, refusals[0].settings)
    return _without_idle_learning(recipe, layout.arch)


def _without_idle_learning(recipe: Recipe, arch: Arch) -> Recipe:
    """Layer-wise learning ends where a target has left no map of a layer's own to learn."""
    own = [name for name in recipe.folded if not arch.site(name).stream]
    own += [name for name, spec in recipe.online.items() if parse_spec(spec)[0] not in FIXED]
    return recipe if own else dataclasses.replace(recipe, layerwise=None)


def refuse(target: Target, layout: Layout, recipe: Recipe) -> None:
    """Raises: InputError: the target cannot serve this layout; names the reason and the settings that fit."""
    if refusals := target.refusals(layout, recipe):
        fits = all(refusal.settings.keys() - FORMATS for refusal in refusals)
        advice = f"; learn it for this target with --set target={target.name}" if fits else ""
        reasons = "; ".join(map(str, refusals))
        raise InputError(f"'{target.name}' cannot express this run: {reasons}{advice}.")


def _compressed_tensors(layout: Layout, recipe: Recipe) -> list[Refusal]:
    return [
        *weight_refusals(layout, tuple(COMPRESSED)),
        *activation_refusals(layout, COMPRESSED),
        *bias_refusals(layout, recipe),
        *online_refusals(layout, recipe),
    ]


def _gguf(layout: Layout, recipe: Recipe) -> list[Refusal]:
    online = [
        Refusal(f"llama.cpp has no online transforms, and '{spot}' needs one", {f"online.{spot}": "none"})
        for spot in layout.online
    ]
    biased = layout.arch.name == "qwen3" and layout.biases
    settings = avoiding(layout.arch, recipe, layout.biases)
    unknown = [Refusal("llama.cpp's Qwen3 has no biases", settings)] if biased else []
    sliding = [Refusal("attention within a sliding window is not written to GGUF")] if layout.sliding else []
    return [*weight_refusals(layout, ("mxfp4",)), *online, *bias_refusals(layout, recipe), *unknown, *sliding]


def _transformers(layout: Layout, recipe: Recipe) -> list[Refusal]:
    """Under a scale that follows a whole tensor what is rounded depends on what else is in the batch: no engine can
    agree."""
    if layout.activations is None or layout.activations.scale_element == "e8m0" or layout.activations.tensor_scale:
        return []
    reason = f"activations in {layout.activations} share one scale over the whole batch, so that answers depend on it"
    return [Refusal(reason, {"activations": STATIC})]


for _target in (
    Target("compressed-tensors", "vLLM, and transformers where nothing runs online", _compressed_tensors),
    Target("transformers", "transformers after `import latmix`; every recipe", _transformers),
    Target("gguf", "llama.cpp; dense MXFP4 and biases, nothing online", _gguf),
):
    TARGETS.add(_target.name, _target)

__all__ = [
    "ATTENTION",
    "HEAD",
    "MLP",
    "TARGETS",
    "Layout",
    "Refusal",
    "Target",
    "expected",
    "expected_biases",
    "family",
    "fit",
    "refuse",
    "respelled",
    "sliding",
]
