"""Zero-shot tasks through lm-evaluation-harness (an optional extra: `pip install 'latmix[eval]'`).

Prompts, requests, scoring and standard errors are the harness's; this file hands it a loaded model and keeps the result
of every item, which is what an interval of a recovery needs. Tasks come from the hub by the harness's names, or, under
the same names, from a folder of local files (`latmix/eval/tasks`). Given up: the harness's groups, whose members are
tasks of their own here.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latmix.errors import FailedError, InputError, UnavailableError
from latmix.model.load import Loaded
from latmix.progress import Progress

DEFINITIONS = Path(__file__).parent / "tasks"
LOCAL = "local_"
METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task reports is its accuracy here
RESAMPLED = (
    2  # resamples for errors of other metrics (a perplexity's, of 5,000 items: minutes), which nobody reads here
)


@dataclass(frozen=True)
class TaskScore:
    """One task.

    Attributes:
        metric: which of the harness's accuracies this is.
        accuracy, stderr: as the harness reports them.
        items: each item's accuracy, in the order of the documents.
    """

    task: str
    metric: str
    accuracy: float
    stderr: float
    items: list[float]


def measure_task(
    loaded: Loaded,
    name: str,
    folder: str | None = None,
    options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> TaskScore:
    """Measure one task.

    Args:
        folder: holds the local files; None: the hub's data.
        options: arguments of the harness's `simple_evaluate` or of its `HFLM`, values as text (`{"limit": "100"}`).
        progress: told of every request.

    Raises: LatmixError: the harness is not installed, an unknown task or option, or a task without accuracy.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UnavailableError(f"Tasks need lm-evaluation-harness: pip install 'latmix[eval]' ({error}).") from error
    for_model, for_run = _options(options or {}, HFLM.__init__, simple_evaluate)
    for_run.setdefault("bootstrap_iters", RESAMPLED)
    manager = _hub() if folder is None else _local(folder)
    asked = name if folder is None else LOCAL + name
    if asked not in manager.all_subtasks:
        known = ", ".join(sorted(task.removeprefix(LOCAL) for task in manager.all_subtasks if task.startswith(LOCAL)))
        raise InputError(
            f"Unknown task '{name}'; " + (f"local files: {known}." if folder else "see `lm-eval ls tasks`.")
        )
    progress = progress or Progress()
    model = _telling(HFLM, name, progress)(pretrained=loaded.model, tokenizer=loaded.tokenizer, **for_model)
    model.set_cache_hook(_Hook(progress))
    result = simple_evaluate(model, tasks=[asked], task_manager=manager, log_samples=True, **for_run)
    assert result is not None  # None on other ranks than the first only
    return _score(name, result["results"][asked], result["samples"][asked])


class _Hook:
    """The harness's way to be told what has been answered. Where its own cache is asked for (`use_cache`), that is told
    instead."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self._progress.advance()


def _telling(harness: Any, name: str, progress: Progress) -> Any:
    """The harness's class of models, which tells how many requests a task has."""

    def told(kind: str) -> Callable[..., Any]:
        def answer(model: Any, requests: Sequence[Any]) -> Any:
            progress.stage(f"{name}, requests", len(requests))
            return getattr(harness, kind)(model, requests, disable_tqdm=True)

        return answer

    kinds = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    return type("Telling", (harness,), {kind: told(kind) for kind in kinds})


@functools.cache
def _hub() -> Any:
    """The harness's own index of tasks. Cost: reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _local(folder: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata={"folder": folder})


def _options(options: Mapping[str, str], *owners: Any) -> list[dict[str, Any]]:
    """The options shared out by who knows the name; the first owner goes first.

    `batch_size` is known to both, and a model that is already made wants it at its making.
    """
    shares: list[dict[str, Any]] = [{} for _ in owners]
    known = [list(inspect.signature(owner).parameters) for owner in owners]
    for key, text in options.items():
        owner = next((i for i, names in enumerate(known) if key in names), None)
        if owner is None:
            raise InputError(f"Unknown task option '{key}'; known: {', '.join(dict.fromkeys(sum(known, [])))}.")
        try:
            shares[owner][key] = json.loads(text)
        except json.JSONDecodeError:
            shares[owner][key] = text
    return shares


def _score(name: str, result: Mapping[str, Any], samples: list[dict[str, Any]]) -> TaskScore:
    found = {key.partition(",")[0]: key for key in result}
    metric = next((metric for metric in METRICS if metric in found), None)
    if metric is None:
        raise FailedError(f"The task '{name}' reports none of {', '.join(METRICS)}.")
    key = found[metric]
    error = result[key.replace(metric, f"{metric}_stderr", 1)]
    if not isinstance(error, float):
        raise InputError(f"The task '{name}' has no standard error: it needs two items and bootstrap_iters above 0.")
    in_order = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return TaskScore(name, metric, float(result[key]), float(error), [float(s[metric]) for s in in_order])
