"""Mistral: Llama to a change of basis (its sliding window moves no basis)."""

from dataclasses import replace

from latmix.archs.base import ARCHS
from latmix.archs.llama import LLAMA

MISTRAL = ARCHS.add("mistral", replace(LLAMA, name="mistral", causal_lm="MistralForCausalLM"))
