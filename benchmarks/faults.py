"""The fault campaign: a tiny run is killed, starved, damaged and disturbed, and goes on; what it ends in is compared.

    python benchmarks/faults.py --kills 200 --others 20 --out docs/results/robustness-faults.md

Every trial is a process of its own, forked from this one once everything is imported. A trial is survived if what was
done ends in the same bytes as a run that nothing disturbed (kills, signals, a full disk, a second process), or if what
was damaged is refused with a documented error or makes no difference. Anything else is printed, and the exit code is 1.
"""

import argparse
import collections
import contextlib
import datetime
import errno
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; a process with threads is not forked
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from tests.test_pipeline import save_tiny  # noqa: E402

import latmix  # noqa: E402
from latmix import export, rundir, stages  # noqa: E402
from latmix.assets import CALIBRATION  # noqa: E402
from latmix.cli import main as program  # noqa: E402
from latmix.errors import LatmixError  # noqa: E402
from latmix.export.folder import open_export  # noqa: E402

SETTINGS = {
    **{"calibration.windows": "4", "calibration.held_out": "2", "calibration.window": "32", "folded.values": "qr"},
    **{f"{stage}.{key}": "2" for stage in ("learning", "tuning") for key in ("batch", "evaluate_every")},
    **{"learning.steps": "6", "tuning.steps": "6"},
}
RECIPE = "latmix-plus"  # it has every stage
STAGES = ("learn", "fold", "quantize", "measure", "tune", "save")
CRASHED = 99
Job = Callable[[], object]


@dataclass
class Child:
    """A forked process; `stage` is the last one it said it is in."""

    pid: int
    notes: int
    told: Path
    began: float = field(default_factory=time.monotonic)
    stage: str = "start"
    code: int | None = None

    def wait(self, stage: str | None = None, seconds: float = 600) -> bool:
        """Until it enters the stage, or for so long, or until it ends. Returns whether it is still there."""
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            if select.select([self.notes], [], [], min(0.01, seconds))[0]:
                words = os.read(self.notes, 65536).decode().split()
                self.stage = words[-1] if words else self.stage
                if not words:
                    self._reap()
                elif stage in words:
                    return True
        return self.code is None

    def _reap(self) -> None:
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.notes)

    def end(self, number: int | None = None) -> int:
        """Send a signal, if one is given; the exit code."""
        if number is not None and self.code is None:
            os.kill(self.pid, number)
        self.wait()
        assert self.code is not None, "a trial hangs"
        return self.code

    @property
    def words(self) -> str:
        return self.told.read_text(errors="replace")


def start(job: Job, told: Path) -> Child:
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
        job()
    except LatmixError as error:
        print(f"latmix: {error}", flush=True)
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = CRASHED
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

    stages.Stages.stage = stage  # type: ignore[method-assign]


def content(folder: Path) -> dict[str, object]:
    """Every file's bytes, without what says how long something took."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".jsonl":
            steps = [json.loads(line) for line in file.read_text().splitlines()]
            found[file.name] = [{key: value for key, value in step.items() if key != "seconds"} for step in steps]
        elif file.is_file() and file.name not in ("log.txt", "summary.json"):
            found[str(file.relative_to(folder))] = file.read_bytes()
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        found["summary"] = {key: value for key, value in summary.items() if key not in ("stages", "kernels")}
    return found


def differ(ours: dict[str, object], whole: dict[str, object]) -> list[str]:
    """Names of what is not the same."""
    return [name for name in sorted(ours.keys() | whole.keys()) if ours.get(name) != whole.get(name)]


class Campaign:
    """Trials, and what became of them, by kind."""

    def __init__(self, folder: Path, seed: int, until: float) -> None:
        self.folder, self.random, self.until = folder, random.Random(seed), until
        self.model = save_tiny(folder / "model", hidden_size=32, intermediate_size=32, head_dim=8)
        self.tried: collections.Counter[str] = collections.Counter()
        self.survived: collections.Counter[str] = collections.Counter()
        self.count = 0
        self.run_path, self.export_path = folder / "whole", folder / "whole-export"
        for job in (self.quantize(self.run_path), self.export(self.export_path), self.evaluate(folder / "whole.json")):
            child = self.start(job)
            if child.end():
                raise SystemExit(f"A run that nothing disturbs fails:\n{child.words}")
        self.seconds = {"evaluate": 1.0, "export": time.monotonic() - child.began}
        summary = json.loads((self.run_path / "summary.json").read_text())
        self.seconds |= {name: cost["seconds"] for name, cost in summary["stages"].items()}
        self.whole, self.exported = content(self.run_path), content(self.export_path)
        self.evaluated = (folder / "whole.json").read_bytes()

    @property
    def time_left(self) -> bool:
        return time.monotonic() < self.until

    def fresh(self) -> Path:
        self.count += 1
        return self.folder / f"{self.count}"

    def start(self, job: Job) -> Child:
        return start(job, self.folder / "told.txt")

    def quantize(self, out: Path, **changes: str) -> Job:
        return lambda: latmix.quantize(self.model, out, RECIPE, CALIBRATION, 0, SETTINGS | changes)

    def export(self, out: Path) -> Job:
        return lambda: export.export(self.run_path, "transformers", out)

    def evaluate(self, out: Path, run: Path | None = None) -> Job:
        def job() -> None:
            found = latmix.evaluate(run or self.run_path, CALIBRATION, self.model, window=64)
            rundir.write_json(out, [found.perplexity.mean, found.kl and found.kl.mean])

        return job

    def note(self, kind: str, fine: bool, child: Child | None = None, count: int = 1) -> None:
        self.tried[kind] += count
        self.survived[kind] += count * fine
        if not fine:
            print(f"--- {kind}, trial {self.count}:\n{child.words[-3000:] if child else ''}", flush=True)

    def goes_on(self, out: Path) -> tuple[bool, Child]:
        """Whether the same command now ends in the bytes of the run that nothing disturbed."""
        child = self.start(self.quantize(out))
        return child.end() == 0 and self.same(out, child), child

    def same(self, out: Path, child: Child) -> bool:
        if names := differ(content(out), self.whole):
            with child.told.open("a") as told:
                told.write(f"(not the bytes of the undisturbed run: {', '.join(names)})\n")
        return not names

    def delay(self, stage: str) -> float:
        return self.random.random() * self.seconds.get(stage, 0.1)


def kills(campaign: Campaign, count: int) -> None:
    """One run is killed twice in each stage, at any moment of it, and then goes on to its end."""
    while sum(campaign.tried[f"kill -9 while {stage}"] for stage in ("start", *STAGES)) < count and campaign.time_left:
        out, hits = campaign.fresh(), collections.Counter[str]()
        for stage in [stage for stage in STAGES for _ in range(2)]:
            child = campaign.start(campaign.quantize(out))
            if child.wait(stage):
                child.wait(seconds=campaign.delay(stage))
            if child.code is None:
                hits[child.stage] += child.end(signal.SIGKILL) == -signal.SIGKILL
            if out.exists():
                break
        fine, child = (campaign.same(out, child), child) if out.exists() else campaign.goes_on(out)
        for stage, killed in hits.items():
            campaign.note(f"kill -9 while {stage}", fine, child, killed)
        shutil.rmtree(out, ignore_errors=True)


def kills_elsewhere(campaign: Campaign, count: int) -> None:
    """The same for evaluation and export, at any moment."""
    for _ in range(count):
        if not campaign.time_left:
            return
        report, exported = campaign.fresh(), campaign.fresh()
        for kind, out, job in (
            ("evaluate", report, campaign.evaluate(report)),
            ("export", exported, campaign.export(exported)),
        ):
            child = campaign.start(job)
            child.wait(seconds=campaign.delay(kind))
            killed = child.code is None and child.end(signal.SIGKILL) == -signal.SIGKILL
            half = out.exists()
            again = child if half else campaign.start(job)
            done = half or again.end() == 0
            same = done and (
                out.read_bytes() == campaign.evaluated if kind == "evaluate" else content(out) == campaign.exported
            )
            if killed:
                campaign.note(f"kill -9 while {kind}", same, again)


def signals(campaign: Campaign, count: int) -> None:
    """Ctrl-C and SIGTERM at the command line: the exit code says so, and the same command goes on."""
    pairs = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    for number, name, code in ((signal.SIGINT, "SIGINT", 130), (signal.SIGTERM, "SIGTERM", 143)):
        for _ in range(count if campaign.time_left else 0):
            out, stage = campaign.fresh(), campaign.random.choice(STAGES)
            words = ["latmix", "quantize", campaign.model, "--out", out, "--recipe", RECIPE, "--seed", 0]
            words += ["--calibration", CALIBRATION, *pairs]

            def job(arguments: list[str] = [str(word) for word in words]) -> None:  # noqa: B006
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.argv = arguments
                program()

            child = campaign.start(job)
            child.wait(stage) and child.wait(seconds=campaign.delay(stage))
            ended = child.end(number)
            fine = ended in (code, 0) and "Traceback" not in child.words
            if fine and ended:
                fine, child = campaign.goes_on(out)
            campaign.note(name, fine, child)


def full_disk(campaign: Campaign, count: int) -> None:
    """Writes that fail: past a file size, by the system; and at any file that is flushed or named, with ENOSPC."""
    largest = max(file.stat().st_size for file in campaign.run_path.iterdir())
    for trial in range(count if campaign.time_left else 0):
        out, limit = campaign.fresh(), campaign.random.randrange(largest)
        left = campaign.random.randrange(1, 40)

        def starved(out: Path = out, limit: int = limit, left: int = left, by_size: bool = trial % 2 == 0) -> None:
            if by_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            else:
                _fail_at(left)
            campaign.quantize(out)()

        child = campaign.start(starved)
        ended = child.end()
        fine = ended in (0, 1) and "Traceback" not in child.words
        if fine and ended:
            fine, child = campaign.goes_on(out)
        campaign.note("full disk: write past a limit" if trial % 2 == 0 else "full disk: ENOSPC", fine, child)


def _fail_at(count: int) -> None:
    """The count-th file that is flushed finds the disk full."""
    original, left = os.fsync, [count]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def damage(campaign: Campaign, folder: Path) -> str:
    """Cut a random file of the folder short, flip a bit of it, or lose it; what was done."""
    file = campaign.random.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    data = bytearray(file.read_bytes())
    kind = campaign.random.choice(("cut short", "bit flipped", "bit flipped", "lost"))
    if kind == "lost":
        file.unlink()
        return f"{file.name} {kind}"
    at = campaign.random.randrange(len(data)) if data else 0
    if kind == "cut short":
        file.write_bytes(data[:at])
    else:
        data[at : at + 1] = bytes(byte ^ 1 << campaign.random.randrange(8) for byte in data[at : at + 1])
        file.write_bytes(data)
    return f"{file.name} {kind} at {at}"


def damaged(campaign: Campaign, count: int) -> None:
    """What comes in, what came out, and what is half done, each with a file cut short, changed or lost."""
    for _ in range(count):
        if not campaign.time_left:
            return
        model, run, served, half = (campaign.fresh() for _ in range(4))
        shutil.copytree(campaign.model, model)
        what = damage(campaign, model)
        child = campaign.start(lambda m=model, o=half: latmix.quantize(m, o, "rtn", CALIBRATION, 0, _few()))
        campaign.note("damaged model: refused, or another model", _sentence(child.end(), child, what), child)
        shutil.rmtree(half, ignore_errors=True)

        shutil.copytree(campaign.run_path, run)
        what, report = damage(campaign, run), campaign.fresh()
        child = campaign.start(campaign.evaluate(report, run))
        ended = child.end()
        same = ended != 0 or report.read_bytes() == campaign.evaluated
        campaign.note("damaged run: refused, or no difference", _sentence(ended, child, what) and same, child)

        shutil.copytree(campaign.export_path, served)
        what = damage(campaign, served)
        child = campaign.start(lambda s=served: open_export(s))
        campaign.note("damaged export: refused, or no difference", _sentence(child.end(), child, what), child)


def _few() -> dict[str, str]:
    return {key: value for key, value in SETTINGS.items() if key.startswith("calibration")}


def _sentence(code: int, child: Child, what: str) -> bool:
    """Whether it ended well or in an error of latmix."""
    with child.told.open("a") as told:
        told.write(f"({what}; exit code {code})\n")
    return code in (0, 1, 2) and "Traceback" not in child.words


def bad_numbers(campaign: Campaign, count: int) -> None:
    """A learning rate far too large, and a loss that is NaN at one step: an error with advice, and nothing NaN kept."""
    for _ in range(count):
        if not campaign.time_left:
            return
        rate = 10.0 ** campaign.random.uniform(0, 12)
        out = campaign.fresh()
        child = campaign.start(campaign.quantize(out, **{"learning.lr": repr(rate)}))
        ended = child.end()
        advised = "smaller" in child.words if ended else _finite(out)
        campaign.note("learning rate from 1 to 10¹²", _sentence(ended, child, f"lr {rate:.1e}") and advised, child)

        out, at = campaign.fresh(), campaign.random.randrange(1, 6)

        def poisoned(out: Path = out, at: int = at) -> None:
            _poison(at)
            campaign.quantize(out)()

        child = campaign.start(poisoned)
        ended = child.end()
        fine = ended == 1 and "Traceback" not in child.words
        if fine:
            fine, child = campaign.goes_on(out)
        campaign.note("NaN in a batch, then the same without", fine, child)


def _finite(run: Path) -> bool:
    summary = json.loads((run / "summary.json").read_text())
    values = summary["held_out"]["kl"]["mean"], summary["held_out"]["perplexity"]["mean"]
    return all(value == value and abs(value) != float("inf") for value in values)


def _poison(at: int) -> None:
    """The loss of the at-th backward pass is NaN."""
    original, left = torch.Tensor.backward, [at]

    def backward(self: torch.Tensor, *arguments: object, **options: object) -> None:
        left[0] -= 1
        original(self * float("nan") if left[0] == 0 else self, *arguments, **options)  # type: ignore[arg-type]

    torch.Tensor.backward = backward  # type: ignore[method-assign]


def together(campaign: Campaign, count: int) -> None:
    """A second process on the same run directory is refused, and the first one is not disturbed."""
    for _ in range(count):
        if not campaign.time_left:
            return
        out = campaign.fresh()
        first = start(campaign.quantize(out), campaign.folder / "first.txt")
        if first.wait(campaign.random.choice(STAGES)):
            os.kill(first.pid, signal.SIGSTOP)
            second = campaign.start(campaign.quantize(out))
            refused = second.end() == 1 and "Another process" in second.words
            os.kill(first.pid, signal.SIGCONT)
            fine = first.end() == 0 and campaign.same(out, first)
            campaign.note("two processes on one run", refused and fine, first if refused else second)


OTHERS = (signals, full_disk, damaged, bad_numbers, together)


def work(folder: Path, seed: int, wish: argparse.Namespace) -> None:
    """One process's share of the campaign; what became of it is in `folder/counts.json`."""
    campaign = Campaign(folder, seed, time.monotonic() + 60 * wish.minutes)
    shares = [(kills, wish.kills), (kills_elsewhere, wish.kills // 8)]
    for trials, count in shares + [(trials, wish.others) for trials in OTHERS]:
        trials(campaign, -(-count // wish.jobs))
        (folder / "counts.json").write_text(json.dumps([campaign.tried, campaign.survived]))


def page(tried: collections.Counter[str], survived: collections.Counter[str], arguments: list[str]) -> str:
    rows = [f"| {kind} | {count:,} | {survived[kind]:,} |" for kind, count in tried.items()]
    head = f"""# Faults

{survived.total():,} of {tried.total():,} trials survived ({datetime.date.today()}, {platform.machine()}, torch
{torch.__version__}). A tiny random Llama, `{RECIPE}`. After a kill, a signal, a full disk or NaN the same command
went on and ended in the same bytes as an undisturbed run, times aside. Regenerate:

    python benchmarks/faults.py {" ".join(arguments)}

| fault | tried | survived |
|---|---|---|
"""
    return "\n".join([head.rstrip(), *rows, f"| all | {tried.total():,} | {survived.total():,} |"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="kills of a quantization; a quarter as many of the rest")
    parser.add_argument("--others", type=int, default=2, help="trials of every other kind")
    parser.add_argument("--minutes", type=float, default=1000.0, help="begin no trial later")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here")
    wish = parser.parse_args()
    tried, survived = collections.Counter[str](), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        shares = [Path(folder) / str(index) for index in range(wish.jobs)]
        workers = []
        for index, share in enumerate(shares):
            share.mkdir()
            workers.append(os.fork())
            if not workers[-1]:
                try:
                    work(share, wish.seed + index, wish)
                    os._exit(0)
                finally:
                    traceback.print_exc()
                    os._exit(1)
        ended = [os.waitpid(worker, 0)[1] for worker in workers]
        for share in shares:
            for total, counts in zip((tried, survived), json.loads((share / "counts.json").read_text()), strict=True):
                total.update(counts)
    print(text := page(tried, survived, sys.argv[1:]))
    if wish.out:
        wish.out.write_text(text, "utf-8")
    return 0 if tried == survived and not any(ended) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
