"""Qwen2: Llama with biases on q, k and v, which move with their linear like any bias."""

from dataclasses import replace

from latmix.archs.base import ARCHS
from latmix.archs.llama import LLAMA

QWEN2 = ARCHS.add(
    "qwen2",
    replace(
        LLAMA,
        name="qwen2",
        causal_lm="Qwen2ForCausalLM",
        tiny={key: value for key, value in LLAMA.tiny.items() if key != "head_dim"},
    ),
)
