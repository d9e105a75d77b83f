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
