"""Qwen3: Llama with norms on queries and keys. They act per head after q and k, in a basis no site changes."""

from dataclasses import replace

from latmix.archs.base import ARCHS
from latmix.archs.llama import LLAMA

QWEN3 = ARCHS.add("qwen3", replace(LLAMA, name="qwen3", causal_lm="Qwen3ForCausalLM"))
