"""The quantized model on disk: packed codes and scale bytes for the linears, bfloat16 for everything else.

Per quantized linear `P`: `P.weight_packed` (uint8 codes, 4-bit ones two to a byte), `P.weight_scale` (uint8, one per
block), `P.weight_global_scale` (float32, formats with a tensor scale), `P.bias`. The file is not called
`model.safetensors`, so that nothing loads it as a plain checkpoint by mistake.
"""

import copy
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from latmix.archs import Arch
from latmix.errors import LatmixError
from latmix.model.attach import plain_linear
from latmix.model.load import Loaded, load_tokenizer, pick_device, read_arch
from latmix.model.parts import layers
from latmix.numerics import BlockFormat, Quantized, decode, pack, unpack

FILE = "quantized.safetensors"
KEPT = torch.bfloat16  # embedding, norms, head and biases


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own that shares every tensor: change it by replacing parameters, never in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.no_grad()
def round_kept(model: PreTrainedModel, arch: Arch) -> None:
    """Round what is not quantized to the precision it will be stored in: what follows sees what is served."""
    linears = {f"{arch.layers}.{i}.{name}.weight" for i in range(len(layers(model, arch))) for name in arch.linears}
    for name, parameter in list(model.named_parameters()):
        if name not in linears:
            owner, _, attribute = name.rpartition(".")
            rounded = nn.Parameter(parameter.to(KEPT).to(parameter.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, rounded)


def save(
    model: PreTrainedModel, quantized: dict[str, Quantized], tokenizer: transformers.PreTrainedTokenizerBase, out: Path
) -> None:
    """Write config, tokenizer and tensors."""
    tensors: dict[str, torch.Tensor] = {}
    for path, q in quantized.items():
        tensors[f"{path}.weight_packed"] = pack(q.codes, q.format.element.bits)
        tensors[f"{path}.weight_scale"] = q.scales
        if q.tensor_scale is not None:
            tensors[f"{path}.weight_global_scale"] = q.tensor_scale
    packed = {f"{path}.weight" for path in quantized}
    kept = {name: tensor.to(KEPT) for name, tensor in model.state_dict().items() if name not in packed}
    save_file({name: tensor.cpu().contiguous() for name, tensor in (tensors | kept).items()}, out / FILE)
    model.config.save_pretrained(out)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def restore(path: Path, format: BlockFormat) -> Loaded:
    """The model that `save` wrote, its weights decoded to float32; its inputs are not yet quantized.

    Raises: LatmixError: a tensor is missing, left over or damaged.
    """
    arch = read_arch(path)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        tensors = load_file(path / FILE)
    except (OSError, SafetensorError) as error:
        raise LatmixError(f"'{path / FILE}' cannot be read: {error}") from error
    for index in range(config.num_hidden_layers):
        for name in arch.linears:
            linear_path = f"{arch.layers}.{index}.{name}"
            weight = _decoded(tensors, linear_path, model.get_submodule(linear_path), format)
            _place(model, tensors, linear_path, weight)
    _place(model, tensors, arch.head, _take(tensors, f"{arch.head}.weight"))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    placed = (arch.head, *(f"{arch.layers}.{i}.{n}" for i in range(config.num_hidden_layers) for n in arch.linears))
    absent = [name for name in missing if not name.startswith(tuple(f"{path}." for path in placed))]
    if absent or unexpected:
        raise LatmixError(f"'{path / FILE}' does not fit its config: missing {absent}, unexpected {unexpected}.")
    return Loaded(model.to(pick_device()).eval().requires_grad_(False), arch, load_tokenizer(path), path)


def _take(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise LatmixError(f"The quantized checkpoint lacks the tensor '{name}'.")
    return tensors.pop(name)


def _decoded(tensors: dict[str, torch.Tensor], path: str, linear: nn.Module, format: BlockFormat) -> torch.Tensor:
    assert isinstance(linear, nn.Linear)
    codes = unpack(_take(tensors, f"{path}.weight_packed"), format.element.bits, linear.in_features)
    scale = tensors.pop(f"{path}.weight_global_scale", None)
    return decode(Quantized(codes, _take(tensors, f"{path}.weight_scale"), scale, format, torch.float32))


def _place(model: PreTrainedModel, tensors: dict[str, torch.Tensor], path: str, weight: torch.Tensor) -> None:
    bias = tensors.pop(f"{path}.bias", None)
    model.set_submodule(path, plain_linear(weight.float(), None if bias is None else bias.float()))
