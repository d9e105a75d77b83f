"""Local task files ask what the harness's own definitions for the hub ask, and so score alike."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latmix.comparison import Texts, compare
from latmix.errors import LatmixError
from latmix.eval.zeroshot import DEFINITIONS, _options, _score, measure_task
from latmix.model.load import load
from tests.test_pipeline import save_tiny
from tests.test_progress import Told
from tests.texts import CALIBRATION, OTHER

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # the harness's own

LETTERS = ["A", "B", "C", "D"]
CHOICES = ["a red stone", "the moon", "a dog that barks", "no one at all"]
HELLASWAG_ITEMS = [  # activity_label, ctx_a, ctx_b, endings: as on the hub
    (
        "Roof shingle removal",
        "A man is sitting on a roof.",
        "he",
        ["sings.", "starts pulling up roofing.", "is old.", "x"],
    ),
    (
        "Clean and jerk",
        "A lady walks to a barbell. She bends down.",
        "the lady",
        ["stands.", "walks.", "lifts it.", "no"],
    ),
    ("Youth", "How to swim. Go to the pool! Take a friend.", "", ["Go in.", "Sleep.", "Eat.", "Run."]),
]


def _chosen(question: str, text: str, count: int) -> list[dict[str, Any]]:
    choices = {"text": CHOICES, "label": LETTERS}
    return [{question: text.format(i), "choices": choices, "answerKey": LETTERS[i]} for i in range(count)]


def _winogrande(answer: str) -> dict[str, Any]:
    return {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": answer}


ARC = _chosen("question", "What is {}?", 4)
BOOLQ = [{"passage": f"Snow is {c}.", "question": f"is snow {c}", "label": i} for i, c in enumerate(("red", "white"))]
HELLASWAG = [
    {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": endings, "label": str(i)}
    for i, (label, a, b, endings) in enumerate(HELLASWAG_ITEMS)
]
PIQA = [{"goal": f"How to boil {i}?", "sol1": "Heat it.", "sol2": "Cool it.", "label": i % 2} for i in range(3)]
LAMBADA = [{"text": f"He called the dog {i} times, and at last came the dog"} for i in range(3)]
HUB: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "arc_easy": ("arc/arc_easy", ARC),
    "arc_challenge": ("arc/arc_challenge", ARC),
    "boolq": ("super_glue/boolq/default", BOOLQ),
    "hellaswag": ("hellaswag/hellaswag", HELLASWAG),
    "openbookqa": ("openbookqa/openbookqa", _chosen("question_stem", "Rain {} falls because", 3)),
    "piqa": ("piqa/piqa", PIQA),
    "winogrande": ("winogrande/default", [_winogrande("1"), _winogrande("2")]),
    "lambada_openai": ("lambada/lambada_openai", LAMBADA),
}


def _lines(items: list[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def _multiple(document: dict[str, Any], query: str) -> dict[str, Any]:
    return {"query": query, "choices": document["choices"]["text"], "gold": LETTERS.index(document["answerKey"])}


def _cut(document: dict[str, Any]) -> dict[str, Any]:
    before, after = document["sentence"].split("_")
    options = [before + document[option] for option in ("option1", "option2")]
    return {"context_options": options, "continuation": after.strip(), "gold": int(document["answer"]) - 1}


def write_local(name: str, documents: list[dict[str, Any]], folder: Path) -> None:
    """The same items in the words of the local files."""
    if name.startswith("arc"):
        text = _lines([_multiple(d, f"Question: {d['question']}") for d in documents])
        (folder / f"{name}.jsonl").write_text(text)
    elif name == "boolq":
        asked = [(f"Passage: {d['passage']}\nQuestion: {d['question']}?", d["label"]) for d in documents]
        items = [{"query": query, "choices": ["no", "yes"], "gold": gold} for query, gold in asked]
        (folder / "boolq.jsonl").write_text(_lines(items))
    elif name == "hellaswag":
        begun = [f"{d['activity_label']}: {d['ctx_a']} {d['ctx_b']}".strip() for d in documents]
        six = [[text, d["label"], *d["endings"]] for text, d in zip(begun, documents, strict=True)]
        (folder / "hellaswag_val_full.txt").write_text("".join(f"{line}\n" for item in six for line in item))
    elif name == "openbookqa":
        (folder / "openbook_qa.jsonl").write_text(_lines([_multiple(d, d["question_stem"]) for d in documents]))
    elif name == "piqa":
        kept = [{key: d[key] for key in ("goal", "sol1", "sol2")} for d in documents]
        (folder / "piqa.jsonl").write_text(_lines(kept))
        (folder / "piqa-labels.lst").write_text("".join(f"{d['label']}\n" for d in documents))
    elif name == "winogrande":
        (folder / "winogrande.jsonl").write_text(_lines([_cut(d) for d in documents]))
    else:
        parts = [d["text"].rsplit(" ", 1) for d in documents]
        (folder / "lambada_openai.jsonl").write_text(_lines([{"context": a, "continuation": b} for a, b in parts]))


def hub_task(name: str) -> Any:
    """The harness's definition over the documents above instead of a download."""
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    path, documents = HUB[name]
    config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / f"{path}.yaml", resolve_func=True))
    splits = [config[key] for key in ("training_split", "validation_split", "test_split") if config.get(key)]
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(
        {split: datasets.Dataset.from_list(documents) for split in splits}
    )
    config.pop("tag", None)
    return TaskManager(include_defaults=False).load([config])["tasks"][config["task"]]


def local_task(name: str, folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata={"folder": str(folder)})
    return manager.load(f"local_{name}")["tasks"][f"local_{name}"]


def score(task: Any) -> tuple[list[tuple[Any, ...]], dict[str, float]]:
    """The requests, and the metrics under log-likelihoods that depend on each request alone."""
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    seen: list[tuple[Any, ...]] = []

    class Fixed(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            seen.extend(request.args for request in requests)
            digests = [hashlib.sha256(repr(request.args).encode()).digest() for request in requests]
            return [(-digest[0] / 10 - 0.1, digest[1] < 128) for digest in digests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    manager = TaskManager(include_defaults=False)  # its own would read thousands of definitions
    result = simple_evaluate(Fixed(), tasks=[task], bootstrap_iters=10, task_manager=manager)
    (metrics,) = result["results"].values()
    return seen, {key: value for key, value in metrics.items() if isinstance(value, float)}


@pytest.mark.parametrize("name", list(HUB))
def test_local_files_ask_and_score_as_the_hub_definitions_do(name: str, tmp_path: Path) -> None:
    write_local(name, HUB[name][1], tmp_path)
    requests, metrics = score(local_task(name, tmp_path))
    expected, theirs = score(hub_task(name))
    assert requests == expected and len(requests) >= 3
    assert {key: metrics[key] for key in theirs} == theirs and any(key.startswith("acc") for key in theirs)


def test_every_shared_file_is_read_whole(shared: Path) -> None:
    counts = {
        "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270, "hellaswag": 10042, "openbookqa": 500, "piqa": 1838,
        "winogrande": 1267, "lambada_openai": 5153,
    }  # fmt: skip
    assert {name: len(local_task(name, shared / "benchmarks").eval_docs) for name in counts} == counts


def test_a_comparison_measures_tasks_in_a_process_of_its_own(tmp_path: Path) -> None:
    for name in ("piqa", "lambada_openai"):
        write_local(name, HUB[name][1], tmp_path)
    (row,) = compare(
        save_tiny(tmp_path / "model"),
        [],
        tmp_path / "out",
        texts=Texts(CALIBRATION, OTHER),
        tasks=["piqa", "lambada_openai"],
        task_data=tmp_path,
    )
    (log,) = (tmp_path / "out" / "cells").glob("*/log.txt")
    assert all(stage in log.read_text() for stage in ("load: ", "evaluate: ", "piqa, requests: 6 to do"))
    assert not row.failures and row.tasks is not None and row.tasks.keys() == {"piqa", "lambada_openai"}
    assert row.zero_shot is not None and row.zero_shot.mean == sum(task.mean for task in row.tasks.values()) / 2


def test_a_task_tells_of_every_request(tmp_path: Path) -> None:
    write_local("piqa", HUB["piqa"][1], tmp_path)
    told, loaded = Told(), load(save_tiny(tmp_path / "model"))
    measure_task(loaded, "piqa", str(tmp_path), progress=told)
    assert told.heard == [["piqa, requests", 6, 0, 6]]


FORKS = """
import multiprocessing, sys, threading
from latmix.comparison.cell import _die_with_the_parent
sys.stdin.readline()
threading.Thread(target=_die_with_the_parent, args=(sys.stdin.fileno(),), daemon=True).start()
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map(abs, [-7]), flush=True)
sys.stdin = None
threading.Event().wait()
"""


def test_a_cell_may_fork_and_ends_with_whoever_started_it() -> None:
    """As the harness does for its bootstraps: a forked process closes standard input, on which a thread waits."""
    words = [sys.executable, "-c", FORKS]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(b"a cell\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"[7]\n"
            process.stdin.close()
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()


def test_options_reach_whoever_knows_them() -> None:
    def model(pretrained: str, batch_size: int = 1) -> None: ...
    def run(model: str, limit: int = 1, batch_size: int = 1) -> None: ...

    assert _options({"batch_size": "4", "limit": "0.5"}, model, run) == [{"batch_size": 4}, {"limit": 0.5}]
    with pytest.raises(LatmixError, match="Unknown task option 'limits'; known: pretrained, batch_size, model, limit"):
        _options({"limits": "4"}, model, run)


def test_scores_keep_every_item_in_order_and_prefer_the_normalised_accuracy() -> None:
    result = {"alias": "t", "acc,none": 0.5, "acc_norm,none": 0.25, "acc_norm_stderr,none": 0.1}
    samples = [{"doc_id": i, "acc": 1.0, "acc_norm": value} for i, value in ((2, 0.0), (0, 1.0), (1, 0.0))]
    found = _score("t", result, samples)
    assert (found.metric, found.accuracy, found.stderr, found.items) == ("acc_norm", 0.25, 0.1, [1.0, 0.0, 0.0])
    with pytest.raises(LatmixError, match="needs two items"):
        _score("t", result | {"acc_norm_stderr,none": "N/A"}, samples)
    with pytest.raises(LatmixError, match="reports none of"):
        _score("t", {"bleu,none": 1.0}, [])
