"""The quantized model on disk: packed codes and scale bytes for the linears, bfloat16 for everything else.

A file for the embedding, one for each decoder layer, one for final norm and head. Per quantized linear `P`:
`P.weight_packed` (uint8 codes, 4-bit ones two to a byte), `P.weight_scale` (uint8, one per block),
`P.weight_global_scale` (float32, formats with a tensor scale), `P.bias`. No file is called `model.safetensors`, so
nothing loads one as a plain checkpoint by mistake. A run is sealed (`latmix.seal`); a file that differs is refused.
"""

import copy
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.errors import DamagedError, WriteError
from latmix.model.attach import plain_linear
from latmix.model.load import Loaded, load_tokenizer
from latmix.model.parts import layers, linear
from latmix.model.source import pick_device, read_arch, read_config, skeleton
from latmix.model.tensors import Rows, Tensors, rows, write
from latmix.numerics import BlockFormat, Quantized, decode, pack, unpack
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


def packed(quantized: Mapping[str, Quantized]) -> dict[str, Tensor]:
    """What is stored of these linears, by name."""
    found: dict[str, Tensor] = {}
    for path, q in quantized.items():
        bits, at = q.format.element.bits, 0
        stored = q.codes.new_empty(len(q.codes), -(-q.codes.shape[-1] * bits // 8))
        for codes in rows(q.codes):
            stored[at : at + len(codes)] = pack(codes, bits)
            at += len(codes)
        found |= {f"{path}.weight_packed": stored, f"{path}.weight_scale": q.scales}
        if q.tensor_scale is not None:
            found[f"{path}.weight_global_scale"] = q.tensor_scale
    return found


def write_layer(
    file: Path, path: str, layer: nn.Module, quantized: Mapping[str, Tensor], notes: Mapping[str, str]
) -> None:
    """Write a layer that stands at `path` in the model.

    quantized: what `packed` makes of its linears, by names in the layer. notes: words to keep with the file.

    Raises: WriteError: the disk is full, say.
    """
    kept = {name: tensor for name, tensor in layer.state_dict().items() if f"{name}_packed" not in quantized}
    found = {**quantized, **{name: tensor.to(KEPT) for name, tensor in kept.items()}}
    write(file, {f"{path}.{name}": tensor for name, tensor in found.items()}, notes)


def save(model: PreTrainedModel, arch: Arch, quantized: Mapping[str, Quantized], folder: Path) -> None:
    """Write a whole model. `quantized` by paths in the model."""
    for index, layer in enumerate(layers(model, arch)):
        path = f"{arch.layers}.{index}."
        own = {name.removeprefix(path): q for name, q in quantized.items() if name.startswith(path)}
        write_layer(folder / layer_file(index), path.removesuffix("."), layer, packed(own), {})
    kept = {EMBEDDING: (arch.embedding,), HEAD: (arch.final_norm, arch.head)}
    for file, paths in kept.items():
        owners = {path: model.get_submodule(path) for path in paths}
        found = {f"{path}.{name}": _kept(p) for path, owner in owners.items() for name, p in owner.named_parameters()}
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


def checked(run: Path) -> Tensors:
    """The tensors of a finished run, to be read one at a time. Cost: one pass over its files.

    Raises: DamagedError: a file is missing, cut short, changed or strange.
    """
    files = sorted(run.glob(EVERY))
    check(run, {*listed(run), *(file.name for file in files)})
    return Tensors.of(files)


def restore(run: Path, tensors: Tensors, format: BlockFormat) -> Loaded:
    """The model of a run, its weights decoded to float32; its inputs are not yet quantized.

    tensors: of the run, `checked`.

    Raises: DamagedError: a tensor is missing, left over or of another shape.
    """
    arch, model = read_arch(run), skeleton(run, read_config(run))
    assemble(model, arch, tensors, format)
    return Loaded(model, arch, load_tokenizer(run), run)


def assemble(model: PreTrainedModel, arch: Arch, tensors: Tensors, format: BlockFormat) -> dict[str, Quantized]:
    """Fill a skeleton, in place, and return the codes and scales that its linears were decoded from, by path.

    Raises: DamagedError: a tensor is missing, left over or of another shape.
    """
    left, found, head = set(tensors.stored), dict[str, Quantized](), linear(model, arch.head)
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)  # no longer the embedding's

    def take(name: str) -> Tensor:
        left.discard(name)
        return tensors.tensor(name)

    def bias(path: str) -> Tensor | None:
        return take(f"{path}.bias").to(pick_device(), torch.float32) if f"{path}.bias" in tensors else None

    for path in (f"{arch.layers}.{i}.{name}" for i in range(len(layers(model, arch))) for name in arch.linears):
        width = linear(model, path).in_features
        packed, scales = take(f"{path}.weight_packed"), take(f"{path}.weight_scale")
        scale = f"{path}.weight_global_scale"
        codes, tensor_scale = unpack(packed, format.element.bits, width), take(scale) if scale in tensors else None
        found[path] = Quantized(codes, scales, tensor_scale, format, torch.float32)
        model.set_submodule(path, plain_linear(decode(found[path]).to(pick_device()), bias(path)))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            stored = take(name)
            if stored.shape != parameter.shape:
                raise DamagedError(f"'{name}' is {tuple(stored.shape)}; its config says {tuple(parameter.shape)}.")
            value = nn.Parameter(stored.to(pick_device(), torch.float32, copy=True), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, value)
    model.set_submodule(arch.head, plain_linear(head.weight, bias(arch.head)))
    if left:
        raise DamagedError(f"The checkpoint holds '{min(left)}', which does not fit its config.")
    return found
