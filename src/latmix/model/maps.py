"""The maps of one run: which transform stands where, built from a recipe, owned in one place, saved in one file."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig

from latmix.archs import Arch, Site
from latmix.errors import DamagedError, FailedError, InputError
from latmix.model.tensors import write
from latmix.registry import parse_spec
from latmix.transforms import TRANSFORMS, Affine, Block, Diagonal, Transform


class Maps(nn.Module):
    """Transforms by place. `folded("residual", 3)` is the map whose basis layer 3 lives in; a map of the stream is the
    same object in every layer. `online("down", 3)` is applied to that layer's activation at run time.

    The linears that use a map borrow it; it is a parameter of this module alone.
    """

    def __init__(self, folded: Mapping[str, Transform], online: Mapping[str, Transform]) -> None:
        super().__init__()
        self._folded = nn.ModuleDict(folded)
        self._online = nn.ModuleDict(online)

    def folded(self, site: str, layer: int) -> Transform | None:
        return self._find(self._folded, site, layer)

    def online(self, spot: str, layer: int) -> Transform | None:
        return self._find(self._online, spot, layer)

    @staticmethod
    def _find(maps: nn.ModuleDict, name: str, layer: int) -> Transform | None:
        for key in (name, f"{name}/{layer}"):
            if key in maps:
                found = maps[key]
                assert isinstance(found, Transform)
                return found
        return None

    def each(self) -> Mapping[str, Transform]:
        """Every map by a printable name."""
        pairs = [*self._folded.items(), *((f"online {key}", value) for key, value in self._online.items())]
        return {key: value for key, value in pairs if isinstance(value, Transform)}

    def stream(self, arch: Arch) -> Transform | None:
        """The map of the residual stream."""
        (site,) = (site for site in arch.sites if site.stream)
        return self.folded(site.name, 0)

    def shared(self) -> nn.ModuleList:
        """The maps that belong to no layer alone."""
        return nn.ModuleList(map for key, map in [*self._folded.items(), *self._online.items()] if "/" not in key)

    def of_layer(self, index: int) -> nn.ModuleList:
        """The maps that belong to that layer alone."""
        every = [*self._folded.items(), *self._online.items()]
        return nn.ModuleList(map for key, map in every if key.endswith(f"/{index}"))

    def learned(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def save(self, path: Path) -> None:
        """Raises: WriteError: the file cannot be written."""
        write(path, self.state_dict(), {})

    def restore(self, path: Path) -> None:
        """Raises: LatmixError: the file is missing, damaged, or of other maps."""
        try:
            self.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DamagedError(f"The transforms in '{path}' cannot be loaded: {error}") from error


SHIFTS = ("none", "full", "layers")
"""Whether a folded map has a learned shift, and how far the stream's reaches: to the head, which then has a bias, or to
the end of the layers, whose last linear takes it off again. Elsewhere `full` and `layers` are the same."""


def build_transform(spec: str, size: int, block: int, seed: int) -> Transform:
    """`"lu:init=identity"` → a transform of that size; `init` is block-hadamard unless given, `block` the format's,
    `shift` none.

    Raises: LatmixError: unknown transform, init, property or shift.
    """
    name, properties = parse_spec(spec)
    shift = properties.pop("shift", "none")
    if shift not in SHIFTS:
        raise InputError(f"Transform '{spec}' has an unknown shift '{shift}'; known: {', '.join(SHIFTS)}.")
    init = properties.pop("init", "block-hadamard")
    width = properties.pop("block", str(block))
    if properties:
        raise InputError(f"Transform '{spec}' has no property '{next(iter(properties))}'; known: init, block, shift.")
    if not width.isdecimal():
        raise InputError(f"Transform '{spec}': block takes a whole number, not '{width}'.")
    built = TRANSFORMS[name](size, init, int(width), seed)
    return built if shift == "none" else Affine(built, within=shift == "layers")


def build_maps(
    arch: Arch,
    config: PreTrainedConfig,
    folded: Mapping[str, str],
    online: Mapping[str, str],
    *,
    block: int,
    seed: int,
) -> Maps:
    """One map per site (per layer and KV head where the site is a layer's own).

    Raises: LatmixError: a site or input that the architecture does not have, or a map that cannot stand there.
    """
    in_place: dict[str, Transform] = {}
    for name, spec in folded.items():
        site, build = arch.site(name), partial(_at_site, arch.site(name), config, spec, block)
        in_place |= {name: build(seed)} if site.stream else _each_layer(name, config, build, seed)
    at_run: dict[str, Transform] = {}
    for name, spec in online.items():
        build = partial(build_transform, spec, _input_size(arch.input(name).name, config), block)
        fixed = build(seed)
        # what has parameters is found for each layer, by learning or in closed form; a fixed map serves all layers
        at_run |= _each_layer(name, config, build, seed) if list(fixed.parameters()) else {name: fixed}
    return Maps(in_place, at_run)


def _each_layer(
    name: str, config: PreTrainedConfig, build: Callable[[int], Transform], seed: int
) -> dict[str, Transform]:
    return {f"{name}/{layer}": build(seed + 1000 * layer) for layer in range(config.num_hidden_layers)}


def _at_site(site: Site, config: PreTrainedConfig, spec: str, block: int, seed: int) -> Transform:
    if site.width == "heads":
        heads = range(config.num_key_value_heads)
        return Block([build_transform(spec, _head_width(config), block, seed + head) for head in heads])
    size = config.intermediate_size if site.width == "intermediate" else config.hidden_size
    built = build_transform(spec, size, block, seed)
    if site.exact_for == "diagonal" and not isinstance(built, Diagonal):
        raise InputError(f"The site '{site.name}' cannot hold the transform '{spec}'; choose diagonal.")
    return built


def _input_size(name: str, config: PreTrainedConfig) -> int:
    sizes = {"down": config.intermediate_size, "o": config.num_attention_heads * _head_width(config)}
    return int(sizes.get(name, config.hidden_size))


def _head_width(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


CONDITION = 2.0**20
"""The largest condition number κ of a map, about a million. Folding in float64 then errs by κ · 2⁻⁵³ = 2⁻³³ at most,
far below the 2⁻²⁵ of casting to float32; what was learned in float32, which errs by κ · 2⁻²⁴, has four bits left."""


@torch.no_grad()
def reports(maps: Maps) -> dict[str, dict[str, float]]:
    """Condition number and log-determinant of every map. Cost: the singular values of each dense map.

    Raises: FailedError: a map is too close to having no inverse; names it.
    """
    found = {}
    for name, map in maps.each().items():
        found[name] = {"condition": map.condition(), "logabsdet": float(map.logabsdet())}
        if not found[name]["condition"] <= CONDITION:  # NaN fails too
            raise FailedError(
                f"The map '{name}' has condition number {found[name]['condition']:.1e}, above {CONDITION:.1e}: folding "
                "it loses the weights' precision; choose a smaller lr or a larger learning.volume, and another --out."
            )
    return found
