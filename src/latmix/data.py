"""Text → windows of tokens.

The protocol is the field's usual one for perplexity: the whole text is one sequence (opened by BOS where the tokenizer
has one), cut into full windows; a last incomplete window is dropped. A corpus of many documents can name the separator
between them: then each document is such a sequence, and no window crosses from one into another. Given up: padding,
sampling, streaming of texts larger than memory.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from latmix.errors import InputError
from latmix.recipe import Calibration


@dataclass(frozen=True)
class Corpus:
    """A text file and how its documents are told apart."""

    text: str
    source: str
    separator: str | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(path: Path | str, separator: str | None = None) -> Corpus:
    """Raises: LatmixError: missing, unreadable, not UTF-8, or empty; an empty separator."""
    path = Path(path)
    if separator == "":
        raise InputError("The separator is empty; give what stands between documents, or none.")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"The text '{path}' is not UTF-8 (byte {error.start}).") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no system has
        raise InputError(f"The text '{path}' cannot be read: {getattr(error, 'strerror', error)}.") from error
    if not text.strip():
        raise InputError(f"The text '{path}' is empty.")
    return Corpus(text, str(path), separator)


def windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, window: int, vocabulary: int
) -> Int[Tensor, "windows window"]:
    """All full windows of the corpus, for a model that has `vocabulary` tokens.

    Raises: InputError: the text is shorter than one window, or the tokenizer makes tokens that the model does not have.
    """
    documents = [corpus.text] if corpus.separator is None else corpus.text.split(corpus.separator)
    bos = tokenizer.bos_token_id
    cut: list[list[int]] = []
    tokens = 0
    for ids in tokenizer([text for text in documents if text.strip()], verbose=False)["input_ids"]:
        opened = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        cut += [opened[i : i + window] for i in range(0, len(opened) - window + 1, window)]
        tokens = max(tokens, len(opened))
    if not cut:
        raise InputError(
            f"The text '{corpus.source}' is too short: its longest document holds {tokens} tokens, less than one "
            f"window of {window}."
        )
    found = torch.tensor(cut)
    if (largest := int(found.max())) >= vocabulary:
        raise InputError(
            f"The tokenizer makes token {largest} of the text '{corpus.source}', its model has {vocabulary} tokens: "
            "give the tokenizer that belongs to it."
        )
    return found


def calibration_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, wish: Calibration, longest: int, vocabulary: int
) -> tuple[Int[Tensor, "learn window"], Int[Tensor, "held_out window"]]:
    """Windows to learn from, spread evenly over the text, and the held-out ones, taken from its end.

    longest, vocabulary: what the model takes.

    Raises: LatmixError: the text is too short, and says how many windows it holds; or as `windows`.
    """
    window = min(wish.window, longest)
    every = windows(corpus, tokenizer, window, vocabulary)
    if len(every) < wish.windows + wish.held_out:
        raise InputError(
            f"The calibration text '{corpus.source}' is too short: it holds {len(every)} windows of {window} tokens "
            f"and the recipe asks for {wish.windows} + {wish.held_out} held out; give a longer text, or choose "
            "calibration.windows, calibration.held_out or calibration.window smaller."
        )
    body = every[: len(every) - wish.held_out]
    spread = torch.linspace(0, len(body) - 1, wish.windows).long()
    return body[spread], every[len(every) - wish.held_out :]
