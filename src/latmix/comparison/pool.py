"""Cells side by side, a process each. The smallest thing that does it: a list, and a look every tenth of a second.

The processes of a launcher take cells from the same list (`queue`), each for the GPU that is its own.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from latmix.comparison.plan import Cell
from latmix.comparison.queue import Queue
from latmix.ranks import LAUNCHER
from latmix.rundir import LOG, write_json

WORKER = "latmix.comparison.cell"
INTERVAL = 0.1  # seconds between looks


def default_jobs() -> int:
    """One cell for each GPU, else one; one in each process of a launcher."""
    return 1 if LAUNCHER in os.environ else max(1, torch.cuda.device_count())


def run_cells(cells: Sequence[Cell], jobs: int, done: Callable[[Cell], None]) -> None:
    """Compute those not yet finished, at most `jobs` at a time; with GPUs, slot i uses number i modulo their count.

    A cell that fails leaves its reason in its folder. On any exception here (an interrupt) the running cells are ended.
    done: told of every cell, finished before or computed now by whatever process; in the first process alone.
    """
    queue, running, more = Queue(len(cells)), dict[int, tuple[int, subprocess.Popen[bytes]]](), True
    try:
        while more or running or queue.open:
            for slot in range(jobs):
                while slot not in running and more:
                    if more := (number := queue.take()) is not None:
                        if cells[number].finished:
                            queue.report(number)
                        else:
                            running[slot] = number, _start(cells[number], slot, jobs)
            for slot, (computed, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    assert process.stdin is not None
                    process.stdin.close()
                    _note_death(cells[computed], process.returncode)
                    queue.report(computed)
            for reported in queue.reported():
                done(cells[reported])
            time.sleep(INTERVAL)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


def _start(cell: Cell, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    environment["DISABLE_MULTIPROC"] = (
        "1"  # lm-evaluation-harness: its children would outlive a killed cell, and its lock
    )
    environment.pop(LAUNCHER, None)  # a cell is one process
    slot += int(os.environ.get("LOCAL_RANK", 0))
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[slot % gpus]
    Path(cell.folder).mkdir(parents=True, exist_ok=True)
    cell.failure.unlink(missing_ok=True)
    with Path(cell.folder, LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER], stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment
        )
    assert process.stdin is not None
    process.stdin.write(cell.to_json().encode() + b"\n")
    process.stdin.flush()
    return process


def _note_death(cell: Cell, code: int) -> None:
    """A process that was killed could not say why itself."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        write_json(cell.failure, {"reason": f"The process was ended by {name}{hint}."})
    elif code and not cell.failure.is_file():
        write_json(cell.failure, {"reason": f"The process ended with exit code {code}; see {LOG}."})
