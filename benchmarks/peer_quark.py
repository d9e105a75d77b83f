"""Quark as a peer: rotations by Hadamard matrices, or learned by its trainer: alone on cross-entropy as in SpinQuant,
or with scales on KL over the top 1000 as in OSTQuant. Then its GPTQ.

Its package has the parts of that training and no command that puts them together: `quark_learned` does, by docstrings.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latmix.model.load import Loaded, load

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
LAYERS = {"model_decoder_layers": "model.layers"}


@dataclasses.dataclass(frozen=True)
class Training:
    """How Quark's trainer is called: its loss; the rate of rotations (SGD on the Stiefel manifold; default: SpinQuant's
    own); the places that have scales too ("r1": after norms, "r2": values, "r4": up) and their rate (Adam)."""

    loss: str = "origin"
    rate: float = 1.5
    scales: tuple[str, ...] = ()
    scales_rate: float = 1e-3


def quark(block: int | None) -> Callable[[Loaded, Tensor], Any]:
    """Hadamard matrices as R1, R2 (folded) and R4 (online), in blocks or of the whole width; R2 always of a head."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        return _quantized(loaded.model, taught, _rotation(r4=True, rotation_size=block), _gptq())

    return run


def quark_learned(training: Training) -> Callable[[Loaded, Tensor], Any]:
    """R1 and R2 learned from Hadamard matrices, inputs rounded, weights not; folded, and the result quantized anew.
    Nothing runs online: R4 would be learned too there, a matrix of its own at every down projection."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        from quark.torch import ModelQuantizer
        from quark.torch.algorithm.rotation.rotation import RotationProcessor

        scales = {"train_smooth": True, "smooth_positions": list(training.scales)} if training.scales else {}
        rotation = _rotation(trainable=True, **scales)
        config = _config(rotation, weights=False)
        student = ModelQuantizer(config).quantize_model(loaded.model, _batches(taught))
        rotations, smooth = RotationProcessor.get_trainable_parameters(student, rotation)
        _train(student, load(loaded.path).model, taught, rotations, smooth, training)
        folded = RotationProcessor.post_process_trained_rotation(student, config).state_dict()
        plain = load(loaded.path).model
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())  # tied so far
        plain.load_state_dict({name: folded[name] for name in plain.state_dict()})
        return _quantized(plain, taught, _gptq())

    return run


def _train(student: Any, teacher: Any, taught: Tensor, rotations: list, smooth: list, training: Training) -> None:
    """100 steps of 8 windows on a cosine, as SpinQuant's authors take them."""
    from datasets import Dataset
    from quark.torch.algorithm.rotation.training import SGDG, AdamAndSGDGOptimizer, RotationTrainer
    from transformers import TrainingArguments

    rates = training.rate, training.scales_rate
    optimizer = AdamAndSGDGOptimizer(smooth, rotations, *rates) if smooth else SGDG(rotations, rates[0], stiefel=True)
    with tempfile.TemporaryDirectory() as scratch:
        how = TrainingArguments(
            scratch,
            max_steps=100,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        rows = Dataset.from_dict({"input_ids": taught.tolist(), "labels": taught.tolist()})
        RotationTrainer(
            student,
            how,
            train_dataset=rows,
            optimizers=(optimizer, None),
            original_model=teacher,
            loss_type=training.loss,
        ).train()
    student.eval()


def _quantized(model: Any, taught: Tensor, *algorithms: Any) -> Any:
    from quark.torch import ModelQuantizer

    quantizer = ModelQuantizer(_config(*algorithms))
    return quantizer.freeze(quantizer.quantize_model(model, _batches(taught)))


def _batches(taught: Tensor) -> Any:
    return torch.utils.data.DataLoader(taught, batch_size=8)


def _config(*algorithms: Any, weights: bool = True) -> Any:
    """MXFP4, EVEN scales, for all linears but the head."""
    from quark.torch.quantization.config import config as quark

    static, dynamic = (quark.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=way).to_quantization_spec() for way in (False, True))
    everywhere = quark.QLayerConfig(weight=static if weights else None, input_tensors=dynamic)
    return quark.QConfig(global_quant_config=everywhere, exclude=["lm_head"], algo_config=list(algorithms))


def _gptq() -> Any:
    from quark.torch.quantization.config import config as quark

    linears = [*QKV, "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"]
    return quark.GPTQConfig(**LAYERS, inside_layer_modules=linears)


def _rotation(**settings: Any) -> Any:
    """R1 and R2, and what else the settings say."""
    from quark.torch.quantization.config import config as quark

    def steps(first: str, norm: str, reads: list[str]) -> list[dict[str, Any]]:
        return [{"prev_modules": [first], "norm_module": norm, "next_modules": reads}]

    layer = "model.layers.layer_id."
    attention, gates = [f"{layer}{name}" for name in QKV], [f"{layer}mlp.up_proj", f"{layer}mlp.gate_proj"]
    mlp = steps(f"{layer}self_attn.o_proj", f"{layer}post_attention_layernorm", gates)
    norm, before = f"{layer}input_layernorm", "model.layers.pre_layer_id.mlp.down_proj"
    scaling_layers = {
        "first_layer": steps("model.embed_tokens", norm, attention) + mlp,
        "middle_layers": steps(before, norm, attention) + mlp,
        "last_layer": steps(f"{layer}mlp.down_proj", "model.norm", ["lm_head"]),
    }
    return quark.RotationConfig(scaling_layers, r2=True, **LAYERS, **settings)
