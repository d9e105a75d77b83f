"""FlatQuant as a peer, from msModelSlim: the tool of the company whose researchers wrote the method, with its structure
(singular value decompositions, scales per channel, clipped weights) and its training of one layer at a time.

Its quantizers are of integers; MXFP4 with EVEN scales takes their place, and with them goes the clipping of inputs,
which is part of theirs. Rates and epochs are the authors' (2410.09426), the weights are rounded to nearest as there.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from latmix import fake_quant
from latmix.model.load import Loaded

FORMAT = "mxfp4:scale=even"
AUTHORS = {"epochs": 15, "flat_lr": 5e-3, "lac": False}


class First(nn.Module):
    """A decoder layer that returns a tuple, as layers of older transformers do, which its training expects."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any, **others: Any) -> tuple[Tensor]:
        return (self.layer(*inputs, **others),)


def flatquant() -> Callable[[Loaded, Tensor], Any]:
    """Kronecker maps at every input, online but for the half at the values."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        from msmodelslim.processor.flat_quant.flat_quant import FlatQuantProcessorConfig
        from msmodelslim.processor.flat_quant.flat_quant_utils.flat_fake_quant_linear import ForwardMode
        from msmodelslim.processor.flat_quant.flat_quant_utils.flat_quant_manager import FlatQuantLayerManager
        from msmodelslim.processor.flat_quant.trainer import LayerTrainer

        numpy.random.seed(0)
        _round_in_blocks()
        config = SimpleNamespace(**FlatQuantProcessorConfig().model_dump() | AUTHORS)
        inputs = _inputs(loaded.model, taught)
        for number, layer in enumerate(loaded.model.model.layers):
            name = f"model.layers.{number}"
            layer.requires_grad_(False)
            targets = [layer(*given, **others) for given, others in inputs]
            manager = FlatQuantLayerManager(layer, config)
            manager.register_layer_pairs(_structure(loaded.model.config), name)
            manager.wrap_linear("cpu")
            manager.change_mode(ForwardMode.CALIB)
            LayerTrainer(config).train_layer(SimpleNamespace(module=First(layer), datas=inputs, name=name), targets)
            inputs = [((target,), others) for target, (_, others) in zip(targets, inputs, strict=True)]
        return loaded.model

    return run


def _round_in_blocks() -> None:
    from msmodelslim.processor.flat_quant.flat_quant_utils import flat_fake_quant_linear as linear

    class Weights(linear.WeightQuantizer):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quant(x, FORMAT)

    class Inputs(linear.ActivationQuantizer):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quant(x, FORMAT)

    linear.WeightQuantizer, linear.ActivationQuantizer = Weights, Inputs


@torch.no_grad()
def _inputs(model: Any, taught: Tensor) -> list[tuple[tuple[Tensor], dict[str, Any]]]:
    """What the first layer is given for each window."""
    found: list[tuple[tuple[Tensor], dict[str, Any]]] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, given, others: found.append((given, others)), with_kwargs=True
    )
    for window in taught:
        model(window[None], use_cache=False)
    hook.remove()
    return found


def _structure(config: Any) -> list[dict[str, Any]]:
    """As its adapter for Qwen3 has it; there is none for Llama."""
    from msmodelslim.processor.flat_quant.flat_quant_utils import structure_pair as pairs

    def at(source: str, targets: list[str], pair: type, **extra: Any) -> dict[str, Any]:
        return {"source": source, "targets": targets, "pair_class": pair, "extra_config": extra}

    heads = {"head_dim": config.head_dim, "num_attention_heads": config.num_attention_heads}
    qkv = [f"self_attn.{name}_proj" for name in "qkv"]
    return [
        at("input_layernorm", qkv, pairs.AttnNormLinearPair),
        at("self_attn.v_proj", ["self_attn.o_proj"], pairs.AttnLinearLinearPair, **heads),
        at("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], pairs.MLPNormLinearPair),
        at("mlp.up_proj", ["mlp.down_proj"], pairs.MLPLinearLinearPair),
    ]
