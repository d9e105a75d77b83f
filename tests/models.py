"""Tiny random models of every declared family, with random norm gains and biases: identities would hide mistakes."""

from collections.abc import Mapping

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from latmix.archs import ARCHS, Arch
from latmix.distill import Teacher
from latmix.model.free import Filled, Free, free
from latmix.model.parts import layers
from latmix.model.quantize import quantize_layer
from latmix.numerics import BlockFormat, Quantized
from latmix.progress import Progress
from latmix.recipe import Tuning
from latmix.weights import parse_quantizer


def tiny(name: str, *, tied: bool = False, seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    options = {**ARCHS[name].tiny, "tie_word_embeddings": tied, **changes}
    config = transformers.AutoConfig.for_model(name, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # gains and biases
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 1.0)
        else:
            parameter.mul_(3.0)  # logits that are not all alike
    return model


def known(model: PreTrainedModel) -> Teacher:
    """One to learn from."""
    return Teacher(lambda: model, model.get_output_embeddings(), "")


def rounded(model: PreTrainedModel, arch: Arch, format: BlockFormat) -> dict[str, Quantized]:
    """Round every weight of a whole model to nearest, in place; its codes by path."""
    every = enumerate(layers(model, arch))
    found = [(i, quantize_layer(layer, arch, parse_quantizer("rtn"), format, None).quantized) for i, layer in every]
    return {f"{arch.layers}.{i}.{name}": q for i, by_name in found for name, q in by_name.items()}


def free_parts(
    model: PreTrainedModel,
    arch: Arch,
    quantized: Mapping[str, Quantized],
    unrounded: Mapping[str, Tensor],
    wish: Tuning,
) -> Free:
    """Of a whole model; codes and what they were rounded from by path."""

    def fill(index: int) -> Filled:
        path = f"{arch.layers}.{index}"
        return tuple({name: every[f"{path}.{name}"] for name in arch.linears} for every in (quantized, unrounded))

    return free(model, arch, fill, wish, Progress())


def codes_of(parts: Free, arch: Arch, layers: int) -> dict[str, Quantized]:
    """All codes, by path."""
    paths = [f"{arch.layers}.{index}" for index in range(layers)]
    return {f"{path}.{name}": q for path in paths for name, q in parts.settled(path).items()}


def perturb(module: torch.nn.Module, scale: float, seed: int = 1) -> None:
    """Random parameters, away from every initial point."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(scale * noise / parameter.shape[-1] ** 0.5)
