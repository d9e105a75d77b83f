"""Why an engine cannot serve a layout, rule by rule, and which recipe settings avoid it."""

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from latmix.archs import Arch
from latmix.numerics.formats import FORMATS, parse_format
from latmix.recipe import Recipe
from latmix.registry import parse_spec
from latmix.targets.layout import ATTENTION, HEAD, MLP, Layout, family, respelled, shift_biases, shift_of, slots

SERVED, STATIC = "mxfp4:scale=even", "nvfp4:tensor_scale=1"


@dataclass(frozen=True)
class Refusal:
    """Why an engine cannot serve a layout. `settings` (recipe keys) avoid it; none where nothing does."""

    reason: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        keys = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in self.settings.items())
        return f"{self.reason} ({keys} avoids it)" if keys else self.reason


def weight_refusals(layout: Layout, known: tuple[str, ...]) -> list[Refusal]:
    """Another format than these; or a width that its block does not divide."""
    found, weights = [], layout.weights
    default = FORMATS[weights.name if weights.name in known else known[0]]
    if (weights.name, weights.block) != (default.name, default.block):
        found.append(Refusal(f"its weights are {weights}, not {' or '.join(known)}", {"weights": SERVED}))
    narrow = sorted({width for width in layout.widths.values() if width % default.block})
    if narrow:
        widths = ", ".join(map(str, narrow))
        found.append(Refusal(f"a linear's input width of {widths} is no multiple of the block of {default.block}"))
    return found


def activation_refusals(layout: Layout, known: Mapping[str, str]) -> list[Refusal]:
    """Activations that are rounded, but not as engines round them beside these weights."""
    if layout.weights.name not in known or layout.activations is None:
        return []
    rule, found = parse_format(known[layout.weights.name]), layout.activations
    if found.tensor_scale is not None:
        rule = dataclasses.replace(rule, tensor_scale=found.tensor_scale) if rule.tensor_scale else rule
    if found == rule:
        return []
    return [Refusal(f"it rounds activations as {found}, the engine as {rule}", {"activations": str(rule)})]


def bias_refusals(layout: Layout, recipe: Recipe) -> list[Refusal]:
    """A bias where the stock form of the family has none."""
    everywhere = frozenset(layout.arch.linears) | {HEAD}
    beyond = layout.biases - slots(family(layout).name)
    if not beyond:
        return []
    names = ", ".join(sorted(name.rpartition(".")[2] for name in beyond))
    settings = avoiding(layout.arch, recipe, everywhere - slots(family(layout).name))
    return [Refusal(f"stock {family(layout).name} models have no place for a bias on {names}", settings)]


def online_refusals(layout: Layout, recipe: Recipe) -> list[Refusal]:
    """vLLM asserts that a linear with an online transform has no bias, and only Hadamards are alike in every layer."""
    found = []
    for spot, spec in layout.online.items():
        kind, off = parse_spec(spec)[0], {f"online.{spot}": "none"}
        if layout.weights.name == "nvfp4":
            found.append(Refusal(f"no engine was found that applies the online transform at {spot} beside nvfp4", off))
        if kind != "block-hadamard" and (kind, spot) != ("hadamard", "down"):
            reason = f"the online transform '{spec}' at {spot} is no plain block-Hadamard"
            found.append(Refusal(reason, {f"online.{spot}": "block-hadamard"}))
        group = next((group for group in (ATTENTION, MLP) if group & {*layout.arch.input(spot).readers}), frozenset())
        if group & layout.biases:
            reason = f"vLLM serves no linear that has both a bias and an online transform, as at {spot}"
            found.append(Refusal(reason, avoiding(layout.arch, recipe, group) or off))
    return found


def avoiding(arch: Arch, recipe: Recipe, forbidden: frozenset[str]) -> dict[str, str]:
    """Settings under which the recipe puts no bias on these linears: shorter shifts, fewer tuned biases."""
    settings = {}
    for name, spec in recipe.folded.items():
        here = [shift for shift in _shorter(spec) if not forbidden & shift_biases(arch, name, shift)]
        if forbidden & shift_biases(arch, name, shift_of(spec)):
            settings[f"folded.{name}"] = respelled(spec, here[0])
    if recipe.tuning is not None:
        kept = [spot for spot in recipe.tuning.biases if not forbidden & {*arch.input(spot).readers}]
        if len(kept) < len(recipe.tuning.biases):
            settings["tuning.biases"] = json.dumps(kept)
    return settings


def _shorter(spec: str) -> tuple[str, ...]:
    return ("layers", "none") if shift_of(spec) == "full" else ("none",)
