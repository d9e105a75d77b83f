"""What the engines that serve a model can express: known before anything is learned, and asked again by the export.

An engine takes a fixed architecture: a bias where it has a slot for one, an online transform where it has a place for
one, the formats it has arithmetic for. `Layout` is what a run asks for; a `Target` answers with `Refusal`s, each with
its reason and the recipe settings that avoid it. `fit` applies those settings before learning (`--set target=…`), so
that what is learned is what can be served; the export only refuses. No torch here: a layout is words.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from latmix.archs import ARCHS, Arch
from latmix.errors import InputError
from latmix.numerics.formats import BlockFormat, parse_format
from latmix.recipe import Recipe, override
from latmix.registry import Registry, parse_spec

HEAD = "lm_head"
SERVED = "mxfp4:scale=even"
FIXED = ("hadamard", "block-hadamard")  # online transforms without anything to learn
ATTENTION = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"})
MLP = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
QKV = ATTENTION - {"self_attn.o_proj"}


@dataclass(frozen=True)
class Layout:
    """What a quantized model asks of an engine.

    Attributes:
        widths: input width of every quantized linear of a layer.
        biases: linears of a layer that have a bias in any layer; `lm_head` where the head has one.
        online: input → specification of its online transform.
        sliding: attention is limited to a window.
    """

    arch: Arch
    weights: BlockFormat
    activations: BlockFormat
    widths: Mapping[str, int]
    biases: frozenset[str]
    online: Mapping[str, str]
    sliding: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why an engine cannot serve a layout. `settings` (recipe keys) avoid it; none where nothing does."""

    reason: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        keys = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in self.settings.items())
        return f"{self.reason} ({keys} avoids it)" if keys else self.reason


@dataclass(frozen=True)
class Target:
    """An export format and the engine it is for. `refusals` takes a layout and the recipe that led to it."""

    name: str
    about: str
    refusals: Callable[[Layout, Recipe], list[Refusal]]


TARGETS: Registry[Target] = Registry("target")


def shift_biases(arch: Arch, site_name: str, shift: str) -> frozenset[str]:
    """Which linears (and the head) have a bias when the map of this site has this shift."""
    site = arch.site(site_name)
    if shift == "none":
        return frozenset()
    last = (HEAD,) if shift == "full" else site.writers[-1:]
    return frozenset({*site.readers, *(last if site.stream else site.writers)})


def expected_biases(arch: Arch, recipe: Recipe, native: frozenset[str]) -> frozenset[str]:
    """Where a run of this recipe has biases: the model's own, those that shifts leave behind, and tuned ones."""
    found = set(native).union(*(shift_biases(arch, name, shift_of(spec)) for name, spec in recipe.folded.items()))
    for spot in recipe.tuning.biases if recipe.tuning else ():
        found |= {*arch.input(spot).readers}
    return frozenset(found)


def sliding(config: Mapping[str, Any]) -> bool:
    """Whether some layer attends to a window only."""
    return bool(config.get("sliding_window")) and bool(config.get("use_sliding_window", True))


def fit(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe changed until its target can serve it; as it is where it names no target.

    Raises: LatmixError: unknown target, or no setting helps; gives the reason.
    """
    if recipe.target is None:
        return recipe
    target = TARGETS[recipe.target]
    while refusals := target.refusals(expected(recipe, layout), recipe):
        if not refusals[0].settings:
            raise InputError(f"The target '{target.name}' cannot serve this: {refusals[0].reason}.")
        recipe = override(recipe, refusals[0].settings)
    return _without_idle_learning(recipe, layout.arch)


def _without_idle_learning(recipe: Recipe, arch: Arch) -> Recipe:
    """Layer-wise learning ends where a target has left no map of a layer's own to learn."""
    own = [name for name in recipe.folded if not arch.site(name).stream]
    own += [name for name, spec in recipe.online.items() if parse_spec(spec)[0] not in FIXED]
    return recipe if own else dataclasses.replace(recipe, layerwise=None)


def expected(recipe: Recipe, layout: Layout) -> Layout:
    """What a run of this recipe will ask for, where the unquantized model's layout is `layout`."""
    return dataclasses.replace(
        layout,
        weights=parse_format(recipe.weights),
        activations=parse_format(recipe.activations),
        biases=expected_biases(layout.arch, recipe, layout.biases),
        online=recipe.online,
    )


def refuse(target: Target, layout: Layout, recipe: Recipe) -> None:
    """Raises: LatmixError: the target cannot serve this layout; names the reason and the settings that fit."""
    if refusals := target.refusals(layout, recipe):
        fits = all(refusal.settings for refusal in refusals)
        advice = f"; learn it for this target with --set target={target.name}" if fits else ""
        reasons = "; ".join(map(str, refusals))
        raise InputError(f"'{target.name}' cannot express this run: {reasons}{advice}.")


def family(layout: Layout) -> Arch:
    """The architecture to declare: the model's own, or Llama where only Llama's stock form has slots for the biases.

    Mistral and Qwen2 without a sliding window compute what Llama computes.
    """
    arch = layout.arch
    if arch.name in ("mistral", "qwen2") and not layout.sliding and layout.biases - slots(arch.name):
        return ARCHS["llama"]
    return arch


def slots(name: str) -> frozenset[str]:
    """Linears of a stock model of this family that can be given a bias, in transformers and in vLLM both."""
    return {"llama": ATTENTION | MLP, "qwen2": QKV, "qwen3": QKV, "mistral": frozenset[str]()}[name]


def respelled(spec: str, shift: str) -> str:
    """The same transform with this shift."""
    name, properties = parse_spec(spec)
    properties = {key: value for key, value in properties.items() if key != "shift"}
    if shift != "none":
        properties["shift"] = shift
    tail = ",".join(f"{key}={value}" for key, value in properties.items())
    return f"{name}:{tail}" if tail else name


def format_refusals(layout: Layout, *, activations: bool) -> list[Refusal]:
    """Only MXFP4 in blocks of 32, and activations under the rule that the engines use."""
    found = []
    if (layout.weights.name, layout.weights.block) != ("mxfp4", 32):
        found.append(Refusal(f"its weights are {layout.weights}, not mxfp4", {"weights": SERVED}))
    if activations and layout.activations != parse_format(SERVED):
        found.append(
            Refusal(f"it rounds activations as {layout.activations}, the engine as {SERVED}", {"activations": SERVED})
        )
    narrow = sorted({f"{width}" for width in layout.widths.values() if width % 32})
    if narrow:
        found.append(Refusal(f"a linear's input width of {', '.join(narrow)} is no multiple of the block of 32"))
    return found


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


def shift_of(spec: str) -> str:
    return parse_spec(spec)[1].get("shift", "none")


def _shorter(spec: str) -> tuple[str, ...]:
    return ("layers", "none") if shift_of(spec) == "full" else ("none",)


def _compressed_tensors(layout: Layout, recipe: Recipe) -> list[Refusal]:
    return [
        *format_refusals(layout, activations=True),
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
    return [*format_refusals(layout, activations=False), *online, *bias_refusals(layout, recipe), *unknown, *sliding]


def _transformers(layout: Layout, recipe: Recipe) -> list[Refusal]:
    return []


for _target in (
    Target("compressed-tensors", "vLLM, and transformers where nothing runs online", _compressed_tensors),
    Target("transformers", "transformers after `import latmix`; every recipe", _transformers),
    Target("gguf", "llama.cpp; dense MXFP4 and biases, nothing online", _gguf),
):
    TARGETS.add(_target.name, _target)
