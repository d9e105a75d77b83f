"""What stops a job: kills, signals, a full disk, a second process. `count`: trials of each job."""

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit

from benchmarks.faults.campaign import Campaign, Work
from benchmarks.faults.child import GROWING, Child, full_at, killed_at, operations

IN_A_ROW = 3
"""Kills of one job before it may go on to its end."""

Strike = Callable[[Campaign, Work, Path], Child]


def kills(campaign: Campaign, count: int) -> None:
    """SIGKILL at any moment of a stage, and before any change of a file; a few times in a row, then to the end."""
    strikes: dict[str, Strike] = {"SIGKILL at a moment": at_a_moment, "SIGKILL at a file operation": at_an_operation}
    for fault, strike in strikes.items():
        for work in campaign.works:
            for done in range(0, count, IN_A_ROW):
                if campaign.time_left:
                    killed(campaign, work, fault, strike, min(IN_A_ROW, count - done))


def killed(campaign: Campaign, work: Work, fault: str, strike: Strike, times: int) -> None:
    with campaign.fresh() as folder:
        out, places = folder / "out", list[str]()
        for _ in range(times):
            child = strike(campaign, work, out)
            places += [child.stage] if child.killed else []
            if finished(out):
                break
        fine, child = (campaign.same(work, out, child), child) if finished(out) else campaign.goes_on(work, out)
        for place in places:
            campaign.note(fault, work.name, place, fine, child)


def finished(out: Path) -> bool:
    """A result that is one file has its name a little before what is half done goes."""
    return out.exists() and not out.with_name(f"{out.name}.partial").exists()


def at_a_moment(campaign: Campaign, work: Work, out: Path) -> Child:
    stage, seconds = campaign.moment(work)
    child = campaign.start(work.job(out), out.parent)
    if stage == "start" or child.wait(stage):
        child.wait(seconds=seconds)
    child.end(signal.SIGKILL)
    return child


def at_an_operation(campaign: Campaign, work: Work, out: Path) -> Child:
    number = campaign.random.randint(1, work.operations)
    child = campaign.start(work.job(out), out.parent, operations(out.parent, killed_at(number)))
    child.end()
    return child


def signals(campaign: Campaign, count: int) -> None:
    """Ctrl-C and SIGTERM at the command line: the exit code says so, and the same command goes on."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        for work in campaign.on(*campaign.works):
            for _ in range(count if campaign.time_left else 0):
                with campaign.fresh() as folder:
                    stage, seconds = campaign.moment(work)
                    child = campaign.start(work.job(folder / "out"), folder)
                    if stage == "start" or child.wait(stage):
                        child.wait(seconds=seconds + 0.05)  # until the program has taken the signals over
                    ended = child.end(number)
                    fine = ended in (code, 0) and "Traceback" not in child.words
                    if fine and ended:
                        fine, child = campaign.goes_on(work, folder / "out")
                    campaign.note(number.name, work.name, "", fine, child)


def full_disk(campaign: Campaign, count: int) -> None:
    """No room at a change of a file, past a size of a file, and in a file system of a random size (mounted by root)."""
    for work in campaign.on(*campaign.works):
        for _ in range(count if campaign.time_left else 0):
            number, size = campaign.random.randint(1, work.operations), campaign.random.randrange(work.bytes)
            with campaign.fresh() as folder:
                out = folder / "out"
                starve = operations(folder, full_at(number), GROWING)
                starved(
                    campaign, work, "ENOSPC at a file operation", campaign.start(work.job(out), folder, starve), out
                )
            with campaign.fresh() as folder:
                out, limit = folder / "out", size // 4  # of one file, where the size is of all
                limited = partial(setrlimit, RLIMIT_FSIZE, (limit, limit))
                child = campaign.start(_silently(work.job(out)), folder, limited)
                starved(campaign, work, "EFBIG at a file size", child, out)
            with campaign.fresh() as folder:
                small(campaign, work, folder, size)


def _silently(job: Callable[[], object]) -> Callable[[], object]:
    """What it prints may not grow either."""

    def silent() -> object:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        return job()

    return silent


def small(campaign: Campaign, work: Work, folder: Path, size: int) -> None:
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(4096, size)}", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        return
    try:
        out = disk / "out"
        child = campaign.start(work.job(out), folder)
        child.end()
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        starved(campaign, work, "ENOSPC on a full file system", child, out)
    finally:
        subprocess.run(["umount", disk], check=True)


def starved(campaign: Campaign, work: Work, fault: str, child: Child, out: Path) -> None:
    ended = child.end()
    fine = ended in (0, 1) and "Traceback" not in child.words
    if fine and ended:
        fine, child = campaign.goes_on(work, out)
    campaign.note(fault, work.name, "", fine, child)


def together(campaign: Campaign, count: int) -> None:
    """A second process on the same folder or result is refused, and the first one is not disturbed."""
    for work in campaign.on(*campaign.works):
        for _ in range(count if campaign.time_left else 0):
            with campaign.fresh() as folder:
                out, other = folder / "out", campaign.folder / "second"
                other.mkdir(exist_ok=True)
                first = campaign.start(work.job(out), folder)
                while first.wait(seconds=0.005) and not _begun(folder / "out.partial"):
                    continue  # until it has the lock
                if first.wait(seconds=campaign.random.random() / 10):
                    os.kill(first.pid, signal.SIGSTOP)
                    second = campaign.start(work.job(out), other)
                    second.end()
                    refused = second.sane and ("Another process" in second.words or out.exists())
                    os.kill(first.pid, signal.SIGCONT)
                    fine = first.end() == 0 and campaign.same(work, out, first)
                    campaign.note("two processes on one output", work.name, "", refused and fine, second)
                first.end()


def _begun(partial: Path) -> bool:
    """Whether a process has said there what it makes."""
    return partial.stat().st_size > 0 if partial.is_file() else bool(list(partial.glob("*.json")))
