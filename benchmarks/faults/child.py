"""A process on trial: forked, it says which stage it is in and can be told to fail at one of its file operations."""

import contextlib
import errno
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from latmix import stages
from latmix.errors import LatmixError
from latmix.eval.kept import Kept

CRASHED = 99
GROWING = ("open", "os.rename", "os.mkdir")  # what a full disk refuses
EVENTS = (*GROWING, "os.remove", "os.rmdir")
Job = Callable[[], object]


@dataclass
class Child:
    """Attributes: stage: the last one it said it is in. told: what it prints. code: its exit code, once it has one."""

    pid: int
    notes: int
    told: Path
    began: float = field(default_factory=time.monotonic)
    stage: str = "start"
    code: int | None = None

    def wait(self, stage: str | None = None, seconds: float = 300) -> bool:
        """Until it enters the stage, or for so long, or until it ends. Returns whether it is still there."""
        until = time.monotonic() + seconds
        while self.code is None and (left := until - time.monotonic()) > 0:
            if select.select([self.notes], [], [], left)[0]:
                words = os.read(self.notes, 65536).decode().split()
                self.stage = words[-1] if words else self.stage
                if not words:
                    self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                    os.close(self.notes)
                elif stage in words:
                    return True
        return self.code is None

    def end(self, number: int | None = None) -> int:
        """Send a signal, if one is given; the exit code."""
        if number is not None and self.code is None:
            os.kill(self.pid, number)
        self.wait()
        if self.code is None:
            raise SystemExit(f"A trial hangs in its stage '{self.stage}':\n{self.words}")
        return self.code

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def words(self) -> str:
        return self.told.read_text(errors="replace")

    @property
    def sane(self) -> bool:
        """It ended well or in an error of latmix."""
        return self.code in (0, 1, 2) and "Traceback" not in self.words


def start(job: Job, told: Path, *before: Job) -> Child:
    """before: what else the process does first."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader, told)
    output = os.open(told, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _tell_stages(writer)
    code = 0
    try:
        for each in (*before, job):
            each()
    except LatmixError as error:
        print(f"latmix: {error}", flush=True)
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    with contextlib.suppress(OSError):  # a file that may not grow
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell_stages(writer: int) -> None:
    original = stages.Stages.stage

    @contextlib.contextmanager
    def stage(self: stages.Stages, name: str) -> Iterator[None]:
        os.write(writer, f"{name}\n".encode())
        with original(self, name):
            yield

    def add(self: Kept, results: torch.Tensor) -> None:
        os.write(writer, b"evaluate\n")
        kept(self, results)

    kept = Kept.add
    stages.Stages.stage, Kept.add = stage, add  # type: ignore[method-assign]


def operations(folder: Path, seen: Callable[[int], None], events: tuple[str, ...] = EVENTS) -> Job:
    """Lets the process call `seen(n)` before it changes a file below the folder, or waits for the disk, for the n-th
    time.

    Changes are those that Python reports (PEP 578). What Rust writes on its own is not among them, but its files are
    renamed by Python.
    """
    count, fsync = 0, os.fsync

    def one() -> None:
        nonlocal count
        count += 1
        seen(count)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in events and _changes(event, arguments, str(folder)):
            one()

    def counted(descriptor: int) -> None:
        one()
        fsync(descriptor)

    def job() -> None:
        sys.addaudithook(hook)
        os.fsync = counted

    return job


def _changes(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    inside = str(arguments[0]).startswith(folder)
    return inside or (event in ("os.remove", "os.rmdir") and arguments[1] != -1)  # by a name in an opened folder


def killed_at(number: int) -> Callable[[int], None]:
    def seen(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return seen


def full_at(number: int) -> Callable[[int], None]:
    def seen(count: int) -> None:
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return seen
