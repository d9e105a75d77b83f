"""Other tools' own code, each a function of a loaded model and token windows that returns the quantized model, their
defaults but for what its docstring says. Imported where they are used: none is a dependency of latmix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latmix.model.load import Loaded

Peer = Callable[[Loaded, Tensor], Any]


def compressor(
    *, gptq: bool = True, spinquant: dict[str, Any] | None = None, quip: dict[str, Any] | None = None
) -> Peer:
    """llm-compressor's modifiers, their defaults otherwise."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        import datasets
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier

        quantizer = GPTQModifier if gptq else QuantizationModifier
        steps = [SpinQuantModifier(**spinquant)] if spinquant else [QuIPModifier(**quip)] if quip else []
        steps.append(quantizer(targets="Linear", scheme="MXFP4", ignore=["lm_head"]))
        rows = {"input_ids": taught.tolist(), "attention_mask": torch.ones_like(taught).tolist()}
        oneshot(
            model=loaded.model,
            dataset=datasets.Dataset.from_dict(rows),
            recipe=steps,
            num_calibration_samples=len(taught),
            max_seq_length=taught.shape[1],
        )
        return loaded.model

    return run


def auto_round(iterations: int) -> Peer:
    """AutoRound's signed gradient descent on rounding and ranges. 0: round to nearest, each weight scale the best of
    floor's, its half and its double by squared error; activations always take floor scales."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        from auto_round import AutoRound

        batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in taught]
        tuner = AutoRound(
            loaded.model,
            loaded.tokenizer,
            scheme="MXFP4",
            iters=iterations,
            dataset=batches,
            seqlen=taught.shape[1],
            nsamples=len(taught),
        )
        return tuner.quantize()[0]

    return run


def quark(block: int | None) -> Peer:
    """Quark's Hadamard rotations R1, R2 (folded) and R4 (online), in blocks or of the whole width, then its GPTQ."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        from quark.torch import ModelQuantizer
        from quark.torch.quantization.config import config as quark

        def steps(first: str, norm: str, reads: list[str]) -> list[dict[str, Any]]:
            return [{"prev_modules": [first], "norm_module": norm, "next_modules": reads}]

        layer, qkv = "model.layers.layer_id.", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        attention = [f"{layer}{name}" for name in qkv]
        mlp = steps(
            f"{layer}self_attn.o_proj",
            f"{layer}post_attention_layernorm",
            [f"{layer}mlp.up_proj", f"{layer}mlp.gate_proj"],
        )
        norm, before = f"{layer}input_layernorm", "model.layers.pre_layer_id.mlp.down_proj"
        where = {"model_decoder_layers": "model.layers"}
        rotation = quark.RotationConfig(
            **where,
            v_proj="self_attn.v_proj",
            o_proj="self_attn.o_proj",
            self_attn="self_attn",
            mlp="mlp",
            scaling_layers={
                "first_layer": steps("model.embed_tokens", norm, attention) + mlp,
                "middle_layers": steps(before, norm, attention) + mlp,
                "last_layer": steps(f"{layer}mlp.down_proj", "model.norm", ["lm_head"]),
            },
            r3=False,
            rotation_size=block,
        )
        linears = [*qkv, "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
        mxfp4 = [
            quark.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=dynamic).to_quantization_spec() for dynamic in (False, True)
        ]
        config = quark.QConfig(
            global_quant_config=quark.QLayerConfig(weight=mxfp4[0], input_tensors=mxfp4[1]),
            exclude=["lm_head"],
            algo_config=[rotation, quark.GPTQConfig(**where, inside_layer_modules=linears)],
        )
        tuner = ModelQuantizer(config)
        return tuner.freeze(tuner.quantize_model(loaded.model, torch.utils.data.DataLoader(taught, batch_size=8)))

    return run
