"""A run directory as an exporter sees it: names and shapes at once, tensors one by one.

What the run holds is read from its tensors, not concluded from its recipe: where there are biases is where bias tensors
are. Nothing here builds a model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latmix import recipes
from latmix.archs import Arch
from latmix.errors import DamagedError, InputError
from latmix.model.checkpoint import checked
from latmix.model.maps import Maps, build_maps
from latmix.model.source import read_arch, read_config
from latmix.model.tensors import Tensors
from latmix.numerics import parse_format
from latmix.progress import Progress
from latmix.recipe import Recipe
from latmix.rundir import RECIPE, SUMMARY, TRANSFORMS, is_run, read_json
from latmix.targets import HEAD, Layout, sliding

PACKED, SCALE, GLOBAL = ".weight_packed", ".weight_scale", ".weight_global_scale"


@dataclass(frozen=True)
class Source:
    """Attributes:
    config: the model's `config.json`.
    shapes: of all tensors.
    """

    path: Path
    recipe: Recipe
    summary: dict[str, Any]
    arch: Arch
    config: dict[str, Any]
    maps: Maps
    layout: Layout
    tensors: Tensors
    shapes: dict[str, tuple[int, ...]]

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def linears(self) -> list[str]:
        """Paths of the quantized linears, layer by layer."""
        return [f"{self.arch.layers}.{index}.{name}" for index in range(self.layers) for name in self.arch.linears]

    def tensor(self, name: str) -> Tensor:
        """Raises: LatmixError: the file is damaged."""
        found = self.tensors.tensor(name)
        if name.endswith(SCALE) and self.layout.weights.scale_element == "e8m0" and bool((found == 255).any()):
            raise DamagedError(f"'{name}' in '{self.path}' holds NaN scales.")
        return found


def open_run(path: Path, progress: Progress | None = None) -> Source:
    """Cost: one pass over its files, of which `progress` is told.

    Raises: LatmixError: no run, or a run whose tensors are damaged, missing or of other shapes than it says."""
    if not is_run(path):
        raise InputError(f"'{path}' is not a run directory; make one with latmix quantize MODEL --out RUN.")
    tensors = checked(path, progress)
    recipe, arch, config = recipes.find(str(path / RECIPE)), read_arch(path), read_config(path)
    weights, activations = parse_format(recipe.weights), parse_format(recipe.activations)
    block = (activations or weights).block
    maps = build_maps(arch, config, recipe.folded, recipe.online, block=block, seed=recipe.seed)
    maps.restore(path / TRANSFORMS)
    shapes = {name: stored.shape for name, stored in tensors.stored.items()}
    prefix = f"{arch.layers}.0."
    widths = {}
    for name in arch.linears:
        key = f"{prefix}{name}{PACKED}"
        if key not in shapes:
            raise DamagedError(f"The run '{path}' lacks the tensor '{key}'.")
        widths[name] = shapes[key][-1] * 8 // weights.element.bits
    layout = Layout(
        arch, weights, activations, widths, _biases(arch, shapes), recipe.online, sliding=sliding(config.to_dict())
    )
    source = Source(
        path, recipe, read_json(path / SUMMARY), arch, read_json(path / "config.json"), maps, layout, tensors, shapes
    )
    _check(source)
    return source


def _biases(arch: Arch, shapes: dict[str, tuple[int, ...]]) -> frozenset[str]:
    paths = [name.removesuffix(".bias") for name in shapes if name.endswith(".bias")]
    found = {name for path in paths for name in arch.linears if path.startswith(arch.layers) and path.endswith(name)}
    return frozenset(found | ({HEAD} if arch.head in paths else set()))


def _check(source: Source) -> None:
    """Every linear of every layer is there, its scales fit its codes, and nothing is there that has no owner."""
    block, bits = source.layout.weights.block, source.layout.weights.element.bits
    known = {f"{source.arch.embedding}.weight", f"{source.arch.head}.weight", f"{source.arch.head}.bias"}
    for path in source.linears():
        for key in (path + PACKED, path + SCALE):
            if key not in source.shapes:
                raise DamagedError(f"The run '{source.path}' lacks the tensor '{key}'.")
        (rows, width), scales = source.shapes[path + PACKED], source.shapes[path + SCALE]
        if scales != (rows, -(-(width * 8 // bits) // block)):
            raise DamagedError(f"The scales of '{path}' are {scales}, which does not fit its codes.")
        known |= {path + PACKED, path + SCALE, path + GLOBAL, f"{path}.bias"}
    for name in (f"{source.arch.embedding}.weight", f"{source.arch.head}.weight"):
        if name not in source.shapes:
            raise DamagedError(f"The run '{source.path}' lacks the tensor '{name}'.")
    if strange := [name for name in source.shapes if name not in known and "norm" not in name]:
        raise DamagedError(f"The run '{source.path}' holds '{strange[0]}', which no export knows.")


def zeros(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.bfloat16)
