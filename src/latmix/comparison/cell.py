"""One cell, in a process of its own: `python -m latmix.comparison.cell`, the cell as one line of JSON on standard
input.

A process of its own makes peak memory a figure of this recipe alone, and lets a cell die (out of memory, say) without
the others. Standard input stays open as long as whoever started the cell lives: its end is how an orphan learns that it
is one. A lock on the cell's folder, which the system drops with the process, keeps two processes from computing one
cell; whoever holds it goes on with the run that a killed predecessor left.
"""

import dataclasses
import fcntl
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latmix.comparison.plan import Cell
from latmix.errors import LatmixError
from latmix.eval.zeroshot import measure_task
from latmix.evaluation import evaluate
from latmix.model.load import load
from latmix.pipeline import quantize, restore
from latmix.progress import Logged, Progress
from latmix.rundir import JOURNAL, LOG, write_json


def compute(cell: Cell) -> None:
    """What is missing of the cell: run, evaluation, tasks, in this order, each stored as soon as it is there.

    What takes long is told in the log, where what the process says goes too.

    Raises: whatever stopped it.
    """
    with _owned(Path(cell.folder)):
        told = Logged(Progress(), Path(cell.folder, LOG))
        if cell.recipe is not None and not cell.run.is_dir():
            quantize(cell.model, cell.run, cell.recipe, cell.calibration, progress=told)
        target = Path(cell.model) if cell.recipe is None else cell.run
        ask = cell.measures
        if not cell.evaluation.is_file():
            evaluate(target, ask.text, cell.model, ask.window, ask.separator, told, cell.evaluation)
        if missing := [name for name in ask.tasks if not cell.task(name).is_file()]:
            loaded = load(target, told) if cell.recipe is None else restore(target, progress=told)
            for name in missing:
                scores = measure_task(loaded, name, ask.task_data, ask.task_options, told)
                cell.task(name).parent.mkdir(exist_ok=True)
                write_json(cell.task(name), dataclasses.asdict(scores))
        cell.failure.unlink(missing_ok=True)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / JOURNAL).touch()  # of checksums, of every result that is written below
        yield


def _reason(error: Exception) -> str:
    """A bare assertion, as lm-evaluation-harness makes of an answer longer than the model, has only its line to say."""
    said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
    return said if isinstance(error, LatmixError) and said else f"{type(error).__name__}: {said}"


def _die_with_the_parent(stream: int) -> None:
    """Reads the descriptor, not `sys.stdin`: that would hold a lock, on which every process forked here would hang."""
    os.read(stream, 1)  # returns when the other end is closed
    os._exit(1)


def main() -> None:
    cell = Cell.from_json(sys.stdin.readline())
    threading.Thread(target=_die_with_the_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    try:
        compute(cell)
    except Exception as error:  # the reason is the result of this cell; the others go on
        traceback.print_exc()
        write_json(cell.failure, {"reason": _reason(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
