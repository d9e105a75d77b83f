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
from safetensors.torch import save_file
from torch import Tensor

from latmix.assets import EVALUATION
from latmix.data import read_text, windows
from latmix.errors import DamagedError
from latmix.model.load import Loaded
from latmix.pipeline import restore

FILE = "latmix.fingerprint"
"""A safetensors file by another name: vLLM takes every `*.safetensors` of a folder for weights."""

WINDOWS, WINDOW, TOP, PROMPT, CONTINUE, CHARACTERS = 8, 128, 64, 32, 24, 2000


@dataclass(frozen=True)
class Fingerprint:
    """Attributes: see the module; `request` is what the engine's runner is given."""

    tensors: dict[str, Tensor]
    request: dict[str, Any]


@torch.no_grad()
def take(run: Path, folder: Path) -> None:
    """Write the run's fingerprint into `folder`. Cost: the model in float32, two forwards of each window."""
    loaded, text = restore(run), read_text(EVALUATION)
    window = min(WINDOW, loaded.longest - CONTINUE)
    ids = windows(text, loaded.tokenizer, window)[:WINDOWS]
    logprobs = answers(loaded, ids)
    top = logprobs.topk(min(TOP, logprobs.shape[-1]))
    beginning = text.text[:CHARACTERS]
    save_file(
        {
            "windows": ids,
            "target": following(logprobs, ids),
            "target_weights_only": following(answers(restore(run, rounded=False), ids), ids),
            "top_ids": top.indices.int(),
            "top": top.values.contiguous(),
            "greedy": greedy(loaded, ids[0, : min(PROMPT, window)].tolist()),
            "tokens": torch.tensor(loaded.tokenizer(beginning)["input_ids"]),
        },
        folder / FILE,
        metadata={"text": json.dumps(beginning)},
    )


def read(folder: Path) -> Fingerprint:
    """Raises: DamagedError: it is not what `take` wrote."""
    try:
        with safe_open(folder / FILE, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            text = json.loads(file.metadata()["text"])
        ids = tensors["windows"]
        prompt = ids[0, : min(PROMPT, ids.shape[1])].tolist()
        request = {"windows": ids.tolist(), "prompt": prompt, "continue": len(tensors["greedy"]), "text": text}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(f"'{folder / FILE}' is damaged: {error!r}.") from error
    return Fingerprint(tensors, request)


@torch.no_grad()
def answers(loaded: Loaded, ids: Int[Tensor, "windows window"]) -> Float[Tensor, "windows positions vocabulary"]:
    """Log-probabilities of the token after each position but the last."""
    device = loaded.model.device
    each = [loaded.model(row.unsqueeze(0).to(device), use_cache=False).logits[0, :-1].float().cpu() for row in ids]
    return torch.stack(each).log_softmax(-1)


def following(
    logprobs: Float[Tensor, "windows positions vocabulary"], ids: Int[Tensor, "windows window"]
) -> Float[Tensor, "windows positions"]:
    return logprobs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


def greedy(loaded: Loaded, prompt: list[int]) -> Int[Tensor, " tokens"]:
    """Without a cache, so that nothing but the model decides."""
    ids = torch.tensor([prompt], device=loaded.model.device)
    for _ in range(CONTINUE):
        next_id = loaded.model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, next_id], dim=1)
    return ids[0, len(prompt) :].cpu()
