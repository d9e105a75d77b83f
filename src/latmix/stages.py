"""What each stage of a run cost: seconds and peak memory, over all processes that worked on it."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from latmix.rundir import read_json, write_json

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Stages:
    """A ledger. `seconds` is wall time, summed over a stage's parts; `peak_bytes` the largest resident memory while it
    ran (on systems without a resettable high-water mark: up to its end), pages of mapped files included;
    `peak_device_bytes` the same of GPU allocations.

    file: where `save` keeps it for a process that goes on; None: nowhere. What a killed process spent since then is not
        counted.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.costs: dict[str, dict[str, float]] = read_json(file) if file is not None and file.exists() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        _reset_peak()
        began = time.perf_counter()
        yield
        cost = self.costs.setdefault(name, {"seconds": 0.0, "peak_bytes": 0})
        cost["seconds"] += time.perf_counter() - began
        cost["peak_bytes"] = max(cost["peak_bytes"], _peak())
        if torch.cuda.is_available():
            cost["peak_device_bytes"] = max(cost.get("peak_device_bytes", 0), torch.cuda.max_memory_allocated())

    def save(self) -> None:
        if self._file is not None:
            write_json(self._file, self.costs)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if _CLEAR.exists():
        _CLEAR.write_text("5")  # proc(5): resets the resident set's high-water mark


def _peak() -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
