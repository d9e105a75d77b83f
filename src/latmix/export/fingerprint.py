"""What a run answers on a text, kept beside its export: enough to compare an engine's answers anywhere, later.

Some windows of token ids; for each position the log-probability of the token that follows, as the run rounds
activations (`target`) and with weights alone quantized (`target_weights_only`, for engines with finer activations); the
64 likeliest tokens; a greedy continuation; and what the tokenizer makes of the text's beginning.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latmix.assets import EVALUATION
from latmix.data import read_text, windows
from latmix.errors import DamagedError
from latmix.export.source import Source
from latmix.export.streamed import Streamed
from latmix.model.load import load_tokenizer
from latmix.model.tensors import write
from latmix.progress import Progress
from latmix.rundir import read_json, write_json

FILE = "latmix.fingerprint"
"""A safetensors file by another name: vLLM takes every `*.safetensors` of a folder for weights."""

WINDOWS, WINDOW, TOP, PROMPT, CONTINUE, CHARACTERS = 8, 128, 64, 32, 24, 2000


@dataclass(frozen=True)
class Fingerprint:
    """Attributes: see the module; `request` is what the engine's runner is given."""

    tensors: dict[str, Tensor]
    request: dict[str, Any]


@torch.no_grad()
def take(source: Source, folder: Path, progress: Progress) -> None:
    """Write the run's fingerprint into `folder`; a killed one goes on after the windows, or after the last token.

    progress: told of every layer of every pass. Cost: `CONTINUE` + 1 passes over the run, a layer in memory.

    Raises: WriteError: the file cannot be written.
    """
    answers, greedy = (folder / f"{FILE}.{part}" for part in ("windows", "greedy"))
    if not (folder / FILE).exists():
        model, tokenizer, text = Streamed(source, progress), load_tokenizer(source.path), read_text(EVALUATION)
        known = read_json(greedy) if greedy.exists() else []
        passes = 1 + CONTINUE, answers.exists() + len(known)
        progress.stage("fingerprint", *(count * source.layers for count in passes))
        if not answers.exists():
            window = min(WINDOW, int(source.config["max_position_embeddings"]) - CONTINUE)
            ids = windows(text, tokenizer, window, int(source.config["vocab_size"]))[:WINDOWS]
            write(answers, _answers(model, ids), {})
        kept, _ = _stored(answers)
        begun = torch.tensor(prompt(kept["windows"]) + known)
        for token in model.greedy(begun, CONTINUE - len(known)):
            known.append(token)
            write_json(greedy, known)
        beginning = text.text[:CHARACTERS]
        once = {"greedy": torch.tensor(known), "tokens": torch.tensor(tokenizer(beginning)["input_ids"])}
        write(folder / FILE, kept | once, {"text": json.dumps(beginning)})
    for part in (answers, greedy):
        part.unlink(missing_ok=True)


def _answers(model: Streamed, ids: Int[Tensor, "windows window"]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"target": [], "target_weights_only": [], "top_ids": [], "top": []}
    for row, rounded, alone in zip(ids, *model.hidden((ids, True), (ids, False)), strict=True):
        logprobs = model.logprobs(rounded[:-1])
        top = logprobs.topk(min(TOP, logprobs.shape[-1]))
        found["target"].append(following(logprobs, row))
        found["target_weights_only"].append(following(model.logprobs(alone[:-1]), row))
        found["top_ids"].append(top.indices.int())
        found["top"].append(top.values)
    return {"windows": ids} | {name: torch.stack(rows) for name, rows in found.items()}


def prompt(ids: Int[Tensor, "windows window"]) -> list[int]:
    """What is continued."""
    found: list[int] = ids[0, :PROMPT].tolist()
    return found


def read(folder: Path) -> Fingerprint:
    """Raises: DamagedError: it is not what `take` wrote."""
    tensors, metadata = _stored(folder / FILE)
    try:
        ids, text = tensors["windows"], json.loads(metadata["text"])
        request = {"windows": ids.tolist(), "prompt": prompt(ids), "continue": len(tensors["greedy"]), "text": text}
    except (LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"'{folder / FILE}' is damaged: {error!r}.") from error
    return Fingerprint(tensors, request)


def _stored(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its tensors and metadata. Raises: DamagedError: it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            return tensors, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"'{file}' cannot be read: {error!r}.") from error


def following(
    logprobs: Float[Tensor, "*windows positions vocabulary"], ids: Int[Tensor, "*windows window"]
) -> Float[Tensor, "*windows positions"]:
    """Of the token that comes after each position but the last."""
    return logprobs.gather(-1, ids[..., 1:].unsqueeze(-1)).squeeze(-1)
