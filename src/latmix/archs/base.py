"""What a model family looks like to a change of basis: a declaration, never a copy of its forward.

Two kinds of places matter, and they are all that latmix knows of a model:

- a **site** is a basis that can be changed *for free*: its writers produce vectors in it, its readers consume them, and
  a map T folds into both. The residual stream is one site for the whole model, the attention values one per layer;
- an **input** is one activation on its way into linears: where the quantizer stands, where an online transform can
  stand, and what the linears that read it share (a Hessian).

Paths are relative to a decoder layer unless said otherwise. Given up: families whose layers differ from one another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from latmix.registry import Registry


@dataclass(frozen=True)
class Site:
    """A basis that a map can change by folding.

    Attributes:
        name: the word in a recipe.
        writers: linears (or the one norm) whose outputs live in this basis.
        readers: linears whose inputs live in it.
        stream: the vectors are *added up* (residual stream): one map for the whole model, whose shift is put on the
            stream once, by the embedding; writers apply the linear part only.
        exact_for: the widest class of maps that leaves the model's function untouched. `"rotation"` where an
            uncorrected RMSNorm reads the basis, `"affine"` where only linears do, `"diagonal"` where a norm's gain
            writes it or products of coordinates are taken in it; there, other maps cannot stand at all.
        width: what a vector of this basis is as long as: the stream, the heads of the values (a map for each), or the
            inside of the MLP.
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    stream: bool
    exact_for: Literal["rotation", "affine", "diagonal"]
    width: Literal["hidden", "heads", "intermediate"] = "hidden"


@dataclass(frozen=True)
class Input:
    """One activation and the linears that read it.

    Attributes:
        name: the word in a recipe (`online.down`).
        readers: linears that all see this activation.
        norm: the norm that produces it, whose gain folds into the readers; None if something else produces it.
    """

    name: str
    readers: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Arch:
    """A model family.

    Attributes:
        name: Hugging Face's `model_type`.
        causal_lm: its class, as `config.json` lists it under `architectures`.
        sites, inputs: see above; inputs in the order in which a layer computes them.
        tiny: keyword arguments of a config small enough for a test, with grouped-query attention.
        layers, embedding, final_norm, head: paths from the model.
    """

    name: str
    causal_lm: str
    sites: tuple[Site, ...]
    inputs: tuple[Input, ...]
    tiny: Mapping[str, Any]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def site(self, name: str) -> Site:
        return self._sites[name]

    def input(self, name: str) -> Input:
        return self._inputs[name]

    @property
    def linears(self) -> tuple[str, ...]:
        """Every quantized linear of a layer, in the order of computation."""
        return tuple(reader for spot in self.inputs for reader in spot.readers)

    def sources(self, linear: str) -> tuple[Site, ...]:
        """The sites `linear` reads, in the order in which their maps act on what it reads."""
        return tuple(site for site in self.sites if linear in site.readers)

    def target(self, linear: str) -> Site | None:
        """The site `linear` writes."""
        return next((site for site in self.sites if linear in site.writers), None)

    def norm(self, site: Site) -> str | None:
        """The norm whose gain writes `site`, if one does."""
        return next((spot.norm for spot in self.inputs if spot.norm in site.writers), None)

    @property
    def _sites(self) -> Registry[Site]:
        return _named("site", self.sites)

    @property
    def _inputs(self) -> Registry[Input]:
        return _named("input", self.inputs)


def _named(kind: str, things: tuple[Any, ...]) -> Registry[Any]:
    registry: Registry[Any] = Registry(kind)
    for thing in things:
        registry.add(thing.name, thing)
    return registry


ARCHS: Registry[Arch] = Registry("architecture")
