"""Brevitas as a peer: rotations learned by SGD on the Stiefel manifold (Cayley), as SpinQuant's authors learn theirs.

It is its command for language models that runs here; what the command cannot be told is put in its place: our windows,
and the scale rule of inputs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from latmix.model.load import Loaded

MXFP4 = " ".join(
    f"--{side}-bit-width 4 --{side}-quant-format float_ocp_e2m1 --{side}-quant-type sym"
    f" --{side}-scale-precision po2_scale --{side}-quant-granularity per_group --{side}-group-size 32"
    for side in ("weight", "input")
)
EVEN = "--input-scale-type dynamic --scale-rounding-func-type midmax --custom-quantizer even"
ROTATED = "--replace-rmsnorm --rotation fused_no_fx --rotation-sdpa-regions --rotation-orphan-sink"
LEARNED = (
    "--fine-tune --learning_rate 1.5 --weight_decay 0 --lr_scheduler_type cosine --max_steps 100"
    " --per_device_train_batch_size 8 --use_cpu --report_to none"
)


class Even:
    """Inputs take the scale rule of weights: `midmax`, which is EVEN but for ties."""

    @staticmethod
    def override_quantizers_dict(quantizers: dict[str, Any]) -> dict[str, Any]:
        rule = quantizers["weight_quant"].restrict_value_float_to_int_impl
        inputs = quantizers["linear_input_quant"].let(restrict_value_float_to_int_impl=rule)
        return quantizers | {"linear_input_quant": inputs}

    @staticmethod
    def post_process_quant_model(model: Any) -> Any:
        return model


def brevitas(*, learn: bool) -> Callable[[Loaded, Tensor], Any]:
    """Hadamard matrices folded into the stream (R1) and around the values (R2), online at down (R4), then its GPTQ.
    `learn`: R1 and R2, on cross-entropy, by the rate, steps and schedule of its documentation, SpinQuant's own."""

    def run(loaded: Loaded, taught: Tensor) -> Any:
        from brevitas_examples.common.generative.quantizers import QUANTIZERS_REGISTRY
        from brevitas_examples.llm import main
        from brevitas_examples.llm.llm_args import create_args_parser
        from datasets import Dataset

        QUANTIZERS_REGISTRY.register("even")(Even)
        main.get_dataset_for_model = lambda **_: Dataset.from_dict({"input_ids": taught.tolist()})
        words = f"--model {loaded.path} --dtype float32 --calibration-batch-size 8 --gptq"
        words = f"{words} {MXFP4} {EVEN} {ROTATED}" + f" {LEARNED}" * learn
        return main.quantize_llm(*create_args_parser().parse_known_args(words.split()))[1]

    return run
