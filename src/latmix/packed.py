"""latmix checkpoints in transformers: after `import latmix`, `AutoModelForCausalLM.from_pretrained(DIR)` just works.

Importing this file registers a quantizer, `quant_method: latmix`, which puts a `PackedLinear` where each quantized
linear was: weights stay packed in memory, 4.25 bits each, and are decoded in every forward; biases stand wherever the
checkpoint has them, the head included; online transforms run before activations are rounded. All recipes fit, nothing
is fast.

A transformers that does not know a quantization method warns, and leaves the weights random. So the checkpoints have a
model type of their own, `latmix_llama` for Llama and so on: without the import it is unknown, which is an error nobody
misses. Such a type is a subclass of the stock family without a line of its own. And codes lie under the name of a stock
model's weight with an axis more, which `LlamaForCausalLM.from_pretrained`, never asking for a model type, refuses too.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from latmix.archs import ARCHS, Arch
from latmix.errors import DamagedError
from latmix.model.inputs import quantized_input
from latmix.model.maps import build_transform
from latmix.model.parts import layers, linear
from latmix.numerics import BlockFormat, Quantized, decode, parse_format, unpack
from latmix.transforms import Transform

METHOD, PREFIX, VERSION = "latmix", "latmix_", 2


class PackedLinear(nn.Module):
    """y = W Q(T x) + b, with W as codes, shape (1, out, bytes of a row), and scale bytes.

    Cost: each forward unpacks and decodes the weight, a temporary of its full size in the dtype of x.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        weights: BlockFormat,
        activations: BlockFormat | None,
        online: Transform | None,
        bias: torch.dtype | None,
    ) -> None:
        super().__init__()
        (self.out_features, self.in_features), self.weights, self.activations = shape, weights, activations
        bytes_, blocks = -(-self.in_features * weights.element.bits // 8), -(-self.in_features // weights.block)
        meta: dict[str, Any] = {"device": "meta"}
        self.register_buffer("weight", torch.empty(1, shape[0], bytes_, dtype=torch.uint8, **meta))
        self.register_buffer("weight_scale", torch.empty(shape[0], blocks, dtype=torch.uint8, **meta))
        tensor_scale = None if weights.scale_element == "e8m0" else torch.empty((), dtype=torch.float32, **meta)
        self.register_buffer("weight_global_scale", tensor_scale)
        self.bias = None if bias is None else nn.Parameter(torch.empty(shape[0], dtype=bias, **meta), False)
        self.online = online

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch out"]:
        x = quantized_input(x, self.online, self.activations)
        return F.linear(x, self.decoded(x.dtype), self.bias)

    def decoded(self, dtype: torch.dtype) -> Float[Tensor, "out n"]:
        codes = unpack(self.weight[0], self.weights.element.bits, self.in_features)
        return decode(Quantized(codes, self.weight_scale, self.weight_global_scale, self.weights, dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, weights={self.weights}, activations={self.activations}"


@register_quantization_config(METHOD)
class LatmixConfig(QuantizationConfigMixin):
    """`quantization_config` in config.json.

    Args:
        version: of this layout.
        weights, activations: formats as recipes write them; activations None where they are left alone.
        online: input → specification, block and seed of its transform.
        biases: paths of the linears that have one beyond the family's own.

    Raises: LatmixError: another version.
    """

    def __init__(
        self,
        version: int,
        weights: str,
        activations: str | None,
        online: Mapping[str, Mapping[str, Any]],
        biases: list[str],
        quant_method: str = METHOD,
    ) -> None:
        if version != VERSION:
            raise DamagedError(f"The checkpoint has latmix's layout {version}; this latmix reads layout {VERSION}.")
        self.quant_method, self.version = quant_method, version  # type: ignore[assignment]
        self.weights, self.activations = weights, activations
        self.online, self.biases = {key: dict(value) for key, value in online.items()}, list(biases)


@register_quantizer(METHOD)
class LatmixQuantizer(HfQuantizer):
    """Loads what `latmix export --to transformers` wrote, and what `save_pretrained` makes of it."""

    requires_calibration = True  # from_pretrained does not quantize by itself
    quantization_config: LatmixConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        arch, config = _arch(model), self.quantization_config
        for index, layer in enumerate(layers(model, arch)):
            for name in arch.linears:
                path = f"{arch.layers}.{index}.{name}"
                layer.set_submodule(name, _packed(config, arch, name, linear(layer, name), path in config.biases))
        if arch.head in config.biases:
            old = linear(model, arch.head)
            head = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype, device="meta")
            model.set_submodule(arch.head, head.requires_grad_(False))
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """A transform's constants are not in the file, and transformers has put uninitialized memory in their place."""
        arch = _arch(model)
        for layer in layers(model, arch):
            for spot in arch.inputs:
                for name in spot.readers if spot.name in self.quantization_config.online else ():
                    place = layer.get_submodule(name)
                    assert isinstance(place, PackedLinear) and place.online is not None
                    online = _online(self.quantization_config, spot.name, place.in_features)
                    online.load_state_dict(place.online.state_dict())
                    place.online = online.to(place.weight.device)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _arch(model: PreTrainedModel) -> Arch:
    return ARCHS[model.config.model_type.removeprefix(PREFIX)]


def _online(config: LatmixConfig, spot: str, size: int) -> Transform:
    """Rebuilt from its specification, off the meta device that models are made on."""
    with torch.device("cpu"):
        return build_transform(size=size, **config.online[spot]).requires_grad_(False)


def _packed(config: LatmixConfig, arch: Arch, name: str, old: nn.Linear, bias: bool) -> PackedLinear:
    spot = next(spot for spot in arch.inputs if name in spot.readers)
    online = _online(config, spot.name, old.in_features) if spot.name in config.online else None
    shape = (old.out_features, old.in_features)
    dtype = old.weight.dtype if bias or old.bias is not None else None
    return PackedLinear(shape, parse_format(config.weights), parse_format(config.activations), online, dtype)


def _register(arch: Arch) -> None:
    stock_config, stock_model = CONFIG_MAPPING[arch.name], getattr(transformers, arch.causal_lm)
    name = f"{PREFIX}{arch.name}"
    config = type(f"Latmix{stock_config.__name__}", (stock_config,), {"model_type": name, "__module__": __name__})
    model = type(class_name(arch), (stock_model,), {"config_class": config, "__module__": __name__})
    transformers.AutoConfig.register(name, config)
    transformers.AutoModelForCausalLM.register(config, model)


def class_name(arch: Arch) -> str:
    return f"Latmix{arch.causal_lm}"


for _name in ARCHS:
    _register(ARCHS[_name])
