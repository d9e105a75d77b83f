"""Why an engine cannot serve a layout, rule by rule, and which recipe settings avoid it."""

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from latmix.archs import Arch
from latmix.numerics.formats import parse_format
from latmix.recipe import Recipe
from latmix.registry import parse_spec
from latmix.targets.layout import ATTENTION, HEAD, MLP, Layout, family, respelled, shift_biases, shift_of, slots


@dataclass(frozen=True)
class Refusal:
    """Why an engine cannot serve a layout. `settings` (recipe keys) avoid it; none where nothing does."""

    reason: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        keys = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in self.settings.items())
        return f"{self.reason} ({keys} avoids it)" if keys else self.reason


def weight_refusals(layout: Layout, known: Iterable[str]) -> list[Refusal]:
    """Another format than these, named with the rule for activations; or a width that its block does not divide."""
    served = {parse_format(spec).name: parse_format(spec) for spec in known}
    found, weights = [], layout.weights
    if weights.name not in served or weights.block != served[weights.name].block:
        first = next(iter(known))
        found.append(Refusal(f"its weights are {weights}, not {' or '.join(served)}", {"weights": first}))
    block = served[weights.name].block if weights.name in served else 32
    narrow = sorted({width for width in layout.widths.values() if width % block})
    if narrow:
        widths = ", ".join(map(str, narrow))
        found.append(Refusal(f"a linear's input width of {widths} is no multiple of the block of {block}"))
    return found


def activation_refusals(layout: Layout, known: Iterable[str]) -> list[Refusal]:
    """Activations that are rounded, but not as engines round them beside these weights."""
    rule = next((spec for spec in known if parse_format(spec).name == layout.weights.name), None)
    if rule is None or layout.activations is None or layout.activations == parse_format(rule):
        return []
    return [Refusal(f"it rounds activations as {layout.activations}, the engine as {rule}", {"activations": rule})]


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
