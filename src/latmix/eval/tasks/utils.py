"""Local benchmark files → the documents that the YAML files beside this one describe to lm-evaluation-harness.

The files hold what the hub's datasets hold, in other words; here the prompt is put together as the harness's
definitions for the hub do it, so that both ask the same questions (a test compares the requests). The folder is handed
over as the harness's `metadata` (`{"folder": …}`).

Two differences are in the data, and cannot be undone here: BoolQ's passages lack the title that SuperGLUE puts before
them, and HellaSwag's contexts are cleaned already, so that where the last, unfinished sentence began has to be told
from the punctuation.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

Document = dict[str, Any]
SPLIT = "test"


def _lines(folder: str, file: str) -> list[str]:
    return Path(folder, file).read_text("utf-8").splitlines()


def _task(file: str, document: Callable[[Document], Document]) -> Callable[..., datasets.DatasetDict]:
    def load(folder: str, **_: object) -> datasets.DatasetDict:
        return _split([document(json.loads(line)) for line in _lines(folder, file)])

    return load


def _split(documents: list[Document]) -> datasets.DatasetDict:
    return datasets.DatasetDict({SPLIT: datasets.Dataset.from_list(documents)})


def asked(item: Document) -> Document:
    """ARC: "Question: …" → "Question: …\\nAnswer:"."""
    return {**item, "query": f"{item['query']}\nAnswer:"}


def read(item: Document) -> Document:
    """BoolQ: "Passage: …\\nQuestion: …?" → the same without the first word, and "Answer:"."""
    return asked({**item, "query": item["query"].removeprefix("Passage: ")})


def completed(item: Document) -> Document:
    """LAMBADA: the last word is the target."""
    return {"query": item["context"], "target": f" {item['continuation']}"}


def piqa(folder: str, **_: object) -> datasets.DatasetDict:
    items = [json.loads(line) for line in _lines(folder, "piqa.jsonl")]
    labels = _lines(folder, "piqa-labels.lst")
    return _split(
        [
            {"query": f"Question: {i['goal']}\nAnswer:", "choices": [i["sol1"], i["sol2"]], "gold": int(label)}
            for i, label in zip(items, labels, strict=True)
        ]
    )


def hellaswag(folder: str, **_: object) -> datasets.DatasetDict:
    """Six lines an item: context, index of the right ending, four endings."""
    lines = _lines(folder, "hellaswag_val_full.txt")
    starts = range(0, len(lines), 6)
    return _split(
        [{"query": begun(lines[i]), "choices": lines[i + 2 : i + 6], "gold": int(lines[i + 1])} for i in starts]
    )


def begun(context: str) -> str:
    """The unfinished sentence at the end of a context, capitalised as the harness does with the field it comes from."""
    if context[-1] in ".!?\"')":
        return context
    *finished, tail = re.split(r"(?<=[.!?]) ", context)
    return " ".join([*finished, tail.capitalize()])


arc_easy, arc_challenge = _task("arc_easy.jsonl", asked), _task("arc_challenge.jsonl", asked)
boolq = _task("boolq.jsonl", read)
openbookqa = _task("openbook_qa.jsonl", dict)
winogrande = _task("winogrande.jsonl", dict)
lambada_openai = _task("lambada_openai.jsonl", completed)
