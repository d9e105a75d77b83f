"""Model families as declarations. To add one, write one file that adds an `Arch` and import it here."""

from latmix.archs import llama, mistral, qwen2, qwen3  # noqa: F401  (each registers itself)
from latmix.archs.base import ARCHS, Arch, Input, Site

__all__ = ["ARCHS", "Arch", "Input", "Site"]
