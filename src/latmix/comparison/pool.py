"""Cells side by side, a process each. The smallest thing that does it: a list, and a look every tenth of a second."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from latmix.comparison.plan import Cell
from latmix.rundir import write_json

WORKER, LOG = "latmix.comparison.cell", "log.txt"
INTERVAL = 0.1  # seconds between looks


def default_jobs() -> int:
    """One cell for each GPU, else one."""
    return max(1, torch.cuda.device_count())


def run_cells(cells: Sequence[Cell], jobs: int, done: Callable[[Cell], None]) -> None:
    """Compute the cells, at most `jobs` at a time; with GPUs, slot i uses number i modulo their count.

    A cell that fails leaves its reason in its folder. On any exception here (an interrupt) the running cells are ended.
    """
    waiting, running = list(cells), dict[int, tuple[Cell, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            for slot in range(jobs):
                if waiting and slot not in running:
                    cell = waiting.pop(0)
                    running[slot] = cell, _start(cell, slot, jobs)
            time.sleep(INTERVAL)
            for slot, (cell, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    assert process.stdin is not None
                    process.stdin.close()
                    _note_death(cell, process.returncode)
                    done(cell)
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()


def _start(cell: Cell, slot: int, jobs: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    environment["DISABLE_MULTIPROC"] = (
        "1"  # lm-evaluation-harness: its children would outlive a killed cell, and its lock
    )
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
