"""A run, or a plain model, against a text: what `latmix evaluate` does."""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from latmix.data import Corpus, read_text, windows
from latmix.errors import InputError
from latmix.eval import Estimate, score, size_of
from latmix.eval.kept import Kept, kept, log_of
from latmix.eval.scores import BATCH, MEASURES
from latmix.model.load import Loaded, load
from latmix.model.source import open_source, pick_device
from latmix.pipeline import quantized_weights, restore, versions
from latmix.progress import Logged, Progress
from latmix.rundir import SUMS, digest, is_run, write_json

LONGEST_WINDOW = 2048  # the field's window for perplexity, where the model can take it


@dataclass(frozen=True)
class Evaluation:
    """`kl` and `top1_agreement` are None without a reference, `bits_per_weight` for an unquantized model."""

    perplexity: Estimate
    kl: Estimate | None
    top1_agreement: Estimate | None
    size_bytes: int
    bits_per_weight: float | None
    text: str
    windows: int
    window: int


def evaluate(
    target: Path | str,
    text: Path | str,
    reference: Path | str | None = None,
    window: int | None = None,
    separator: str | None = None,
    progress: Progress | None = None,
    out: Path | str | None = None,
) -> Evaluation:
    """Measure a run, or a plain Hugging Face model, on a text; with `reference`, against that model.

    Args:
        window: tokens in a window; unless given 2048, or the longest the model can take.
        separator: what stands between documents in the text; None: it is one document.
        out: a JSON file for the result. While it is made, finished batches are kept beside it (`latmix.eval.kept`), and
            an evaluation that was stopped goes on after the last of them; without `out` it begins again. A log is
            beside it too.

    Raises: LatmixError: bad input, in one sentence, or a file that cannot be written.
    """
    ask = partial(_measured, Path(target), text, reference, window, separator)
    if out is None:
        return ask(progress or Progress(), None)
    with kept(Path(out)) as finished:
        result = ask(Logged(progress or Progress(), log_of(Path(out))), finished)
        write_json(Path(out), dataclasses.asdict(result))
    return result


def _measured(
    target: Path,
    text: Path | str,
    reference: Path | str | None,
    window: int | None,
    separator: str | None,
    progress: Progress,
    finished: Kept | None,
) -> Evaluation:
    """finished: takes the batches, and has those that are done."""
    corpus = read_text(text, separator)
    loaded = restore(target, progress=progress) if is_run(target) else load(target, progress)
    original = load(reference, progress) if reference is not None else None
    if window is not None and not 2 <= window <= loaded.longest:
        raise InputError(f"A window of {window} tokens does not fit this model; choose from 2 to {loaded.longest}.")
    cut = windows(corpus, loaded.tokenizer, window or min(LONGEST_WINDOW, loaded.longest), loaded.vocabulary)
    if original and original.vocabulary != loaded.vocabulary:
        raise InputError(f"The reference '{reference}' has another vocabulary than '{target}'.")
    if finished is not None:
        parts = [(1 if original is None else len(MEASURES), ids[:, 1:].numel()) for ids in cut.split(BATCH)]
        finished.begin(_what(loaded, original, corpus, cut, progress), parts)
    scores = score(loaded.model, cut, original.model if original else None, progress=progress, kept=finished)
    size = size_of(target, quantized_weights(loaded.model, loaded.arch))
    found = (scores.perplexity, scores.kl, scores.top1_agreement, size.bytes, size.bits_per_weight)
    return Evaluation(*found, str(text), *cut.shape)


def _what(
    loaded: Loaded,
    original: Loaded | None,
    corpus: Corpus,
    cut: Int[Tensor, "windows window"],
    progress: Progress,
) -> dict[str, Any]:
    """What decides every bit of the result. Cost: one pass over the files of a model that is no run."""
    return {
        "model": _content(loaded, progress),
        "reference": original and _content(original, progress),
        "text": corpus.digest,
        "separator": corpus.separator,
        "window": cut.shape[1],
        "tokens": hashlib.sha256(cut.numpy().tobytes()).hexdigest(),  # another tokenizer makes others
        "device": pick_device().type,
        **versions(),
    }


def _content(loaded: Loaded, progress: Progress) -> str:
    """A run's files are those that its checksums list: opening it has compared them."""
    return digest(loaded.path / SUMS) if is_run(loaded.path) else open_source(loaded.path).digest(progress)
