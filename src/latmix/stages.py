"""What each stage of a run cost: seconds and peak memory."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Stages:
    """A ledger. `seconds` is wall time; `peak_bytes` the largest resident memory while the stage ran (on systems
    without a resettable high-water mark: up to its end); `peak_device_bytes` the same of GPU allocations."""

    def __init__(self) -> None:
        self.costs: dict[str, dict[str, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        _reset_peak()
        began = time.perf_counter()
        yield
        cost: dict[str, float] = {"seconds": time.perf_counter() - began, "peak_bytes": _peak()}
        if torch.cuda.is_available():
            cost["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        self.costs[name] = cost


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
