"""A Hugging Face folder → a whole model, its family's declaration and its tokenizer.

For what couples all layers: learning, analysis, zero-shot tasks. Everything is checked before anything long begins: the
folder, the architecture, the shards, the numbers. Weights load in float32.
"""

from dataclasses import dataclass
from pathlib import Path

import transformers

from latmix.archs import Arch
from latmix.errors import DamagedError
from latmix.model.shards import is_bare
from latmix.model.source import open_source, tie
from latmix.progress import Progress
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

    @property
    def vocabulary(self) -> int:
        """How many tokens it has."""
        return int(self.model.config.vocab_size)


def load(path: Path | str, progress: Progress | None = None) -> Loaded:
    """progress: told of every tensor.

    Raises: LatmixError: no such folder, no or broken config, unknown architecture, missing, truncated or non-finite
    weights, no tokenizer."""
    source = open_source(path)
    tokenizer, model = load_tokenizer(source.path), source.skeleton()
    progress = progress or Progress()
    progress.stage("load", sum(1 for _ in model.parameters()))
    source.fill(model, "", progress=progress)
    tie(model, source.arch)
    return Loaded(model, source.arch, tokenizer, source.path)


def load_tokenizer(path: Path) -> transformers.PreTrainedTokenizerBase:
    """Raises: LatmixError: no tokenizer that transformers can load, or one that lies outside the folder."""
    _check_files(path / "tokenizer_config.json")
    bare = (path / "tokenizer.model").is_file() and not (path / "tokenizer_config.json").is_file()
    # Of a bare SentencePiece file AutoTokenizer makes a generic tokenizer, which drops the space before a first word.
    kind = transformers.LlamaTokenizer if bare else transformers.AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the parser, in Rust, raises nothing more special
        raise DamagedError(f"No tokenizer could be loaded from '{path}': {error}") from error
    return tokenizer


def _check_files(file: Path) -> None:
    """transformers opens what `fast_tokenizer_files` names, wherever that is."""
    config = read_json(file) if file.is_file() else {}
    names = config.get("fast_tokenizer_files") if isinstance(config, dict) else None
    for name in names if isinstance(names, list) else []:
        if not isinstance(name, str) or not is_bare(name):
            raise DamagedError(f"'{file}' names {name!r:.80}, which is no file of the folder.")
