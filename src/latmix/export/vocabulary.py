"""A tokenizer into GGUF: byte-level BPE, which is what Llama 3, Qwen and GPT-2 use.

llama.cpp splits text into words by rules that it knows by name, so the tokenizer's own rule must be one of them.
"""

import json
from pathlib import Path
from typing import Any

from latmix.errors import InputError
from latmix.rundir import read_json

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
SPLITS = {_HEAD + "{1,3}" + _TAIL: "llama-bpe", _HEAD + _TAIL: "qwen2"}
"""Regular expression that splits words → llama.cpp's name for it."""

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Write the tokenizer of `folder`; `rows` is the embedding's, padded beyond the vocabulary.

    Raises: LatmixError: not a byte-level BPE with a known splitting rule.
    """
    tokenizer = read_json(folder / "tokenizer.json")
    model, added = tokenizer["model"], {entry["id"]: entry for entry in tokenizer["added_tokens"]}
    rule = splitting_rule(tokenizer)
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for index, entry in added.items():
        tokens[index], types[index] = entry["content"], CONTROL if entry["special"] else USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    config = read_json(folder / "config.json")
    eos = config.get("eos_token_id")
    opening = opens_with(tokenizer)  # llama.cpp begins with its token of that name, the tokenizer with its own
    bos = config.get("bos_token_id") if opening is None else opening
    if isinstance(bos, int):
        writer.add_bos_token_id(bos)
    if eos is not None:
        writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_add_bos_token(opening is not None)


def splitting_rule(tokenizer: dict[str, Any]) -> str:
    """Raises: LatmixError: see `add_tokenizer`."""
    before = tokenizer.get("pre_tokenizer") or {}
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    kinds = [part.get("type") for part in parts]
    if tokenizer["model"].get("type") == "BPE" and tokenizer.get("normalizer") in (None, {"type": "NFC"}):
        if kinds == ["ByteLevel"] and parts[0]["use_regex"] and not parts[0]["add_prefix_space"]:
            return "gpt-2"
        if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") in SPLITS:
            return SPLITS[parts[0]["pattern"]["Regex"]]
    raise InputError(
        f"The tokenizer ({tokenizer['model'].get('type')}, {json.dumps(kinds)}) is not written to GGUF; known: "
        "byte-level BPE that splits words as GPT-2, Llama 3 or Qwen2 do."
    )


def opens_with(tokenizer: dict[str, Any]) -> int | None:
    """The special token that the tokenizer puts before a text."""
    after = tokenizer.get("post_processor") or {}
    for part in after.get("processors", [after]):
        first = part.get("single", [{}])[0] if part.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            found: int = part["special_tokens"][first["SpecialToken"]["id"]]["ids"][0]
            return found
    return None
