"""The quantized model on disk: packed codes and scale bytes for the linears, bfloat16 for everything else.

A file for the embedding, one for each decoder layer, one for final norm and head. Per quantized linear `P`:
`P.weight_packed` (uint8 codes, 4-bit ones two to a byte), `P.weight_scale` (uint8, one per block),
`P.weight_global_scale` (float32, formats with a tensor scale), `P.bias`. No file is called `model.safetensors`, so
nothing loads one as a plain checkpoint by mistake. A run is sealed (`latmix.seal`); a file that differs is refused.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix import ranks, sharding
from latmix.archs import Arch
from latmix.errors import DamagedError, WriteError
from latmix.model.attach import plain_linear
from latmix.model.load import Loaded, load_tokenizer
from latmix.model.parts import layers, linear
from latmix.model.source import pick_device, read_arch, read_config, skeleton
from latmix.model.tensors import Rows, Tensors, rows, write
from latmix.numerics import BlockFormat, Quantized, decode, pack, unpack
from latmix.progress import Progress
from latmix.rundir import written
from latmix.seal import check, listed

EMBEDDING, HEAD, EVERY = "quantized-embedding.safetensors", "quantized-head.safetensors", "quantized-*.safetensors"
KEPT = torch.bfloat16  # embedding, norms, head and biases


def layer_file(index: int) -> str:
    return f"quantized-layer-{index:05}.safetensors"


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own that shares every tensor: change it by replacing parameters, never in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def round_kept(module: nn.Module, quantized: Collection[str]) -> None:
    """Round what is not quantized to the precision it will be stored in: what follows sees what is served.

    quantized: paths of the linears whose weights are, or will be.
    """
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        if attribute != "weight" or owner not in quantized:
            rounded = nn.Parameter(parameter.to(KEPT).to(parameter.dtype), requires_grad=False)
            setattr(module.get_submodule(owner), attribute, rounded)


class Packing:
    """What is stored of one linear, some rows at a time, in any order. shape: of its weight."""

    def __init__(self, shape: tuple[int, ...], format: BlockFormat) -> None:
        (rows, columns), self._bits = shape, format.element.bits
        self._codes = torch.empty(rows, -(-columns * self._bits // 8), dtype=torch.uint8)
        self._scales = torch.empty(rows, -(-columns // format.block), dtype=torch.uint8)
        self._tensor_scale: Tensor | None = None

    def add(self, found: Quantized, at: int = 0) -> None:
        """Some rows. at: the first one's number."""
        self._scales[at : at + len(found.codes)] = found.scales
        for codes in rows(found.codes):
            self._codes[at : at + len(codes)] = pack(codes, self._bits)
            at += len(codes)
        self._tensor_scale = found.tensor_scale

    def named(self, path: str) -> dict[str, Tensor]:
        """All of it, by name."""
        found = {f"{path}.weight_packed": self._codes, f"{path}.weight_scale": self._scales}
        return found if self._tensor_scale is None else found | {f"{path}.weight_global_scale": self._tensor_scale}


def packed(quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """What is stored of these linears, by name."""
    found: dict[str, Tensor] = {}
    for path, q in quantized.items():
        packing = Packing(q.codes.shape, q.format)
        packing.add(q)
        found |= packing.named(path)
    return found


def write_layer(
    file: Path, path: str, kept: Mapping[str, Tensor], quantized: Mapping[str, Tensor], notes: Mapping[str, str]
) -> None:
    """Write a layer that stands at `path` in the model.

    kept: its tensors by their names in the layer; of a quantized linear's weight none is written. quantized: what
    `packed` makes of its linears, by names in the layer. notes: words to keep with the file.

    Raises: WriteError: the disk is full, say.
    """
    kept = {name: tensor.to(KEPT) for name, tensor in kept.items() if f"{name}_packed" not in quantized}
    write(file, {f"{path}.{name}": tensor for name, tensor in {**quantized, **kept}.items()}, notes)


def write_tables(model: PreTrainedModel, arch: Arch, folder: Path) -> None:
    """Embedding, final norm and head, each put together from all ranks, which all call this; the first writes."""
    kept = {EMBEDDING: (arch.embedding,), HEAD: (arch.final_norm, arch.head)}
    for file, paths in kept.items():
        owners = {path: model.get_submodule(path) for path in paths}
        every = {f"{path}.{name}": p.detach() for path, owner in owners.items() for name, p in owner.named_parameters()}
        found = {name: _kept(sharding.whole(parameter)) for name, parameter in every.items()}
        if ranks.first():
            write(folder / file, found, {})


def _kept(tensor: Tensor) -> Tensor | Rows:
    if tensor.ndim == 1:
        return tensor.to(KEPT)
    return Rows(tuple(tensor.shape), KEPT, (piece.to(KEPT) for piece in rows(tensor)))


def describe(model: PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path, work: Path) -> None:
    """Write config and tokenizer, each file whole or not at all; they are made in `work` first.

    Raises: WriteError: the disk is full, say.
    """
    model.config.tie_word_embeddings = False
    try:
        with tempfile.TemporaryDirectory(dir=work) as made:
            model.config.save_pretrained(made)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(made)
            tokenizer.save_pretrained(made)
            for file in sorted(file for file in Path(made).rglob("*") if file.is_file()):
                with written(folder / file.relative_to(made)) as temporary:
                    shutil.copyfile(file, temporary)
    except WriteError:
        raise
    except Exception as error:  # the tokenizer's own code, in Rust, raises nothing narrower
        raise WriteError(f"Cannot write to '{folder}': {error}.") from error


def checked(run: Path, progress: Progress | None = None) -> Tensors:
    """The tensors of a finished run, to be read one at a time. Cost: one pass over its files.

    Raises: DamagedError: a file is missing, cut short, changed or strange.
    """
    files = sorted(run.glob(EVERY))
    check(run, {*listed(run), *(file.name for file in files)}, progress)
    return Tensors.of(files)


def restore(run: Path, tensors: Tensors, format: BlockFormat, progress: Progress) -> Loaded:
    """The model of a run, its weights decoded to float32; its inputs are not yet quantized.

    tensors: of the run, `checked`. progress: told of every layer.

    Raises: DamagedError: a tensor is missing, left over or of another shape.
    """
    arch, model = read_arch(run), skeleton(run, read_config(run))
    assemble(model, arch, Stored.of(tensors, format), progress)
    return Loaded(model, arch, load_tokenizer(run), run)


@dataclass(frozen=True)
class Stored:
    """The files of a run, and its linears' format. Attributes: left: names that nobody has asked for yet."""

    tensors: Tensors
    format: BlockFormat
    left: set[str]

    @staticmethod
    def of(tensors: Tensors, format: BlockFormat) -> "Stored":
        return Stored(tensors, format, set(tensors.stored))

    def take(self, name: str) -> Tensor:
        """As it is stored. Raises: DamagedError: there is none."""
        self.left.discard(name)
        return self.tensors.tensor(name)

    def bias(self, path: str) -> Tensor | None:
        name = f"{path}.bias"
        return self.take(name).to(pick_device(), torch.float32) if name in self.tensors else None

    def quantized(self, path: str, width: int) -> Quantized:
        """A linear's. width: inputs."""
        packed, scales, scale = self.take(f"{path}.weight_packed"), self.take(f"{path}.weight_scale"), None
        if f"{path}.weight_global_scale" in self.tensors:
            scale = self.take(f"{path}.weight_global_scale")
        codes = unpack(packed, self.format.element.bits, width)
        return Quantized(codes, scales, scale, self.format, torch.float32).to(pick_device())

    def fill(self, module: nn.Module, path: str) -> None:
        """Every parameter of a module that stands at `path` which has none yet, in float32.

        Raises: DamagedError: one is missing or of another shape.
        """
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                owner, _, attribute = name.rpartition(".")
                stored = self.take(f"{path}.{name}")
                if stored.shape != parameter.shape:
                    raise DamagedError(
                        f"'{path}.{name}' is {tuple(stored.shape)}; its config says {tuple(parameter.shape)}."
                    )
                value = nn.Parameter(stored.to(pick_device(), torch.float32, copy=True), requires_grad=False)
                setattr(module.get_submodule(owner), attribute, value)

    def fill_layer(self, layer: nn.Module, arch: Arch, path: str) -> dict[str, Quantized]:
        """Fill a layer; the codes and scales that its linears were decoded from, by their names in it."""
        found = {name: self.quantized(f"{path}.{name}", linear(layer, name).in_features) for name in arch.linears}
        for name, quantized in found.items():
            layer.set_submodule(name, plain_linear(decode(quantized), self.bias(f"{path}.{name}")))
        self.fill(layer, path)
        return found

    def fill_tables(self, model: PreTrainedModel, arch: Arch) -> None:
        """Fill embedding, final norm and head."""
        for path in (arch.embedding, arch.final_norm, arch.head):
            self.fill(model.get_submodule(path), path)
        model.set_submodule(arch.head, plain_linear(linear(model, arch.head).weight, self.bias(arch.head)))


def assemble(
    model: PreTrainedModel,
    arch: Arch,
    stored: Stored,
    progress: Progress,
    each: Callable[[nn.Module], None] = lambda part: None,
) -> None:
    """Fill a skeleton, in place. each: what becomes of embedding, head and every layer once they are filled.
    progress: told of every layer.

    Raises: DamagedError: a tensor is missing, left over or of another shape.
    """
    every = layers(model, arch)
    progress.stage("load", len(every))
    stored.fill_tables(model, arch)
    for path in (arch.embedding, arch.head):
        each(model.get_submodule(path))
    for index, layer in enumerate(every):
        stored.fill_layer(layer, arch, f"{arch.layers}.{index}")
        each(layer)
        progress.advance()
    if stored.left:
        raise DamagedError(f"The checkpoint holds '{min(stored.left)}', which does not fit its config.")
