"""A Hugging Face folder → a model, its family's declaration and its tokenizer, or one sentence that says what is wrong.

Everything is checked before anything long begins: the folder, the architecture, the shards, the numbers. Weights
load in float32; remote code is never run. Given up: downloads (pass a local folder).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from latmix.archs import ARCHS, Arch
from latmix.errors import DamagedError, InputError
from latmix.model.shards import stored_tensors
from latmix.model.sizes import check_config
from latmix.rundir import read_json


@dataclass(frozen=True)
class Loaded:
    """A causal language model in float32 and evaluation mode, with what latmix knows of its family."""

    model: transformers.PreTrainedModel
    arch: Arch
    tokenizer: transformers.PreTrainedTokenizerBase
    path: Path

    @property
    def longest(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return int(self.model.config.max_position_embeddings)


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(path: Path | str) -> Loaded:
    """Raises: LatmixError: no such folder, no or broken config, unknown architecture, missing, truncated or non-finite
    weights, no tokenizer."""
    path = Path(path)
    arch = read_arch(path)
    stored_tensors(path)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise DamagedError(f"The checkpoint in '{path}' cannot be loaded: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise DamagedError(f"The checkpoint in '{path}' lacks {len(missing)} tensors, among them '{missing[0]}'.")
    check_finite(model, path)
    return Loaded(model.to(pick_device()).eval().requires_grad_(False), arch, load_tokenizer(path), path)


def read_arch(path: Path) -> Arch:
    """Raises: LatmixError: no folder, no config, or a family that is not declared."""
    if not path.is_dir():
        raise InputError(f"The model '{path}' is not a folder; give a local Hugging Face checkpoint folder.")
    config = read_json(path / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"'{path / 'config.json'}' names no model_type; known architectures: {', '.join(ARCHS)}.")
    check_config(config, path / "config.json")
    return ARCHS[kind]


def load_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """Raises: LatmixError: no tokenizer that transformers can load."""
    bare = (path / "tokenizer.model").is_file() and not (path / "tokenizer_config.json").is_file()
    # Of a bare SentencePiece file AutoTokenizer makes a generic tokenizer, which drops the space before a first word.
    kind = transformers.LlamaTokenizer if bare else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the parser, in Rust, raises nothing more special
        raise DamagedError(f"No tokenizer could be loaded from '{path}': {error}") from error
    return tokenizer


def check_finite(model: nn.Module, path: Path) -> None:
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise DamagedError(f"The tensor '{name}' in '{path}' holds NaN or infinity.")
