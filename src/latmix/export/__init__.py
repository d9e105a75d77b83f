"""Exports: what was measured is what is served. To add one: rules in `latmix.targets`, a writer in a file here."""

from latmix.export import compressed_tensors, gguf, transformers  # noqa: F401  (each registers itself)
from latmix.export.base import EXPORTS, Export
from latmix.export.card import caveats
from latmix.export.folder import export, open_export, weight_of
from latmix.export.verify import Verdict, installed, verify

__all__ = ["EXPORTS", "Export", "Verdict", "caveats", "export", "installed", "open_export", "verify", "weight_of"]
