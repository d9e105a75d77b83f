"""What a run asks of an engine: formats, widths, and where there are biases and online transforms."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latmix.archs import ARCHS, Arch
from latmix.numerics.formats import BlockFormat, parse_format
from latmix.recipe import Recipe
from latmix.registry import parse_spec

HEAD = "lm_head"
ATTENTION = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"})
MLP = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
QKV = ATTENTION - {"self_attn.o_proj"}


@dataclass(frozen=True)
class Layout:
    """What a quantized model asks of an engine.

    Attributes:
        activations: None where they are left alone.
        widths: input width of every quantized linear of a layer.
        biases: linears of a layer that have a bias in any layer; `lm_head` where the head has one.
        online: input → specification of its online transform.
        sliding: attention is limited to a window.
    """

    arch: Arch
    weights: BlockFormat
    activations: BlockFormat | None
    widths: Mapping[str, int]
    biases: frozenset[str]
    online: Mapping[str, str]
    sliding: bool = False

    @property
    def block(self) -> int:
        """Of block transforms."""
        return (self.activations or self.weights).block


def expected(recipe: Recipe, layout: Layout) -> Layout:
    """What a run of this recipe will ask for, where the unquantized model's layout is `layout`."""
    return dataclasses.replace(
        layout,
        weights=parse_format(recipe.weights),
        activations=parse_format(recipe.activations),
        biases=expected_biases(layout.arch, recipe, layout.biases),
        online=recipe.online,
    )


def expected_biases(arch: Arch, recipe: Recipe, native: frozenset[str]) -> frozenset[str]:
    """Where a run of this recipe has biases: the model's own, those that shifts leave behind, and tuned ones."""
    found = set(native).union(*(shift_biases(arch, name, shift_of(spec)) for name, spec in recipe.folded.items()))
    for spot in recipe.tuning.biases if recipe.tuning else ():
        found |= {*arch.input(spot).readers}
    return frozenset(found)


def shift_biases(arch: Arch, site_name: str, shift: str) -> frozenset[str]:
    """Which linears (and the head) have a bias when the map of this site has this shift."""
    site = arch.site(site_name)
    if shift == "none":
        return frozenset()
    last = (HEAD,) if shift == "full" else site.writers[-1:]
    return frozenset({*site.readers, *(last if site.stream else site.writers)})


def shift_of(spec: str) -> str:
    return parse_spec(spec)[1].get("shift", "none")


def respelled(spec: str, shift: str) -> str:
    """The same transform with this shift."""
    name, properties = parse_spec(spec)
    properties = {key: value for key, value in properties.items() if key != "shift"}
    if shift != "none":
        properties["shift"] = shift
    tail = ",".join(f"{key}={value}" for key, value in properties.items())
    return f"{name}:{tail}" if tail else name


def sliding(config: Mapping[str, Any]) -> bool:
    """Whether some layer attends to less than the longest sequence."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return window is not None and window < config["max_position_embeddings"]


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
