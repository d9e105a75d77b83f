"""What is put on trial, what it ends in when nothing disturbs it, and what became of the trials."""

import collections
import dataclasses
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.faults.child import Child, Job, operations, start
from tests.test_pipeline import save_tiny

from latmix import export
from latmix.assets import CALIBRATION, EVALUATION
from latmix.cli import main as program
from latmix.eval.kept import log_of
from latmix.export.card import CARD  # says where it is; compared by itself
from latmix.rundir import LOG, SUMMARY, SUMS

CALIBRATED = {"calibration.windows": "4", "calibration.held_out": "2", "calibration.window": "32"}
LEARNING = {"calibration.generated": "4"} | {
    f"learning.{key}": value for key, value in (("steps", "6"), ("batch", "2"), ("evaluate_every", "2"))
}
TUNING = {f"tuning.{key}": value for key, value in (("steps", "6"), ("batch", "2"), ("evaluate_every", "2"))}
RECIPES = {
    "latmix-plus": CALIBRATED | LEARNING | TUNING,  # it has every stage
    "flatquant": CALIBRATED | {"layerwise.epochs": "2", "layerwise.batch": "2"},
    "wush": CALIBRATED,
    "gptq": CALIBRATED,
}
STAGES = ("start", "learn", "fold", "quantize", "measure", "tune", "save")
TIMED = (SUMMARY, LOG)  # they say how long something took
TARGETS = ("transformers", "compressed-tensors", *(("gguf",) if find_spec("gguf") else ()))


@dataclass(frozen=True)
class Work:
    """A command. Attributes:
    job: makes it, at the path given.
    whole: what it makes when nothing disturbs it.
    seconds: what each of its stages took. operations: how often it changed a file. bytes: what it wrote.
    """

    name: str
    job: Callable[[Path], Job]
    whole: dict[str, object] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    operations: int = 0
    bytes: int = 0


def content(path: Path) -> dict[str, object]:
    """Every file's bytes, without what says how long something took or where it is."""
    if path.is_file():
        return {"": path.read_bytes()}
    found: dict[str, object] = {}
    for file in sorted(path.rglob("*")):
        if file.suffix == ".jsonl":
            found[file.name] = re.sub(r'"seconds": [\d.e-]+', "", file.read_text(errors="replace"))
        elif file.name == SUMS:
            lines = [line.split() for line in file.read_text().splitlines()]
            found[file.name] = [line for line in lines if line[1] not in (*TIMED, CARD) and line[1][-6:] != ".jsonl"]
        elif file.is_file() and file.name not in TIMED:
            found[str(file.relative_to(path))] = file.read_bytes().replace(
                str(path).encode(), b"OUT"
            )  # how to serve it
    if (path / SUMMARY).exists():
        summary = json.loads((path / SUMMARY).read_text())
        found[SUMMARY] = {key: value for key, value in summary.items() if key not in ("stages", "kernels")}
    return found


class Campaign:
    """Trials, and what became of them.

    sample: two recipes and one export; and every fault that is no kill is tried on one job only.
    """

    def __init__(self, folder: Path, seed: int, minutes: float, sample: bool) -> None:
        self.sample, recipes, targets = sample, list(RECIPES), TARGETS
        if sample:
            recipes, targets = [recipes[0], recipes[-1]], targets[:1]
        self.folder, self.random, self.until = folder, random.Random(seed), time.monotonic() + 60 * minutes
        self.tried: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.survived: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.model = save_tiny(folder / "model", hidden_size=32, intermediate_size=32, head_dim=8)
        self.text = folder / "text.txt"
        self.text.write_text(EVALUATION.read_text("utf-8")[:20_000], "utf-8")
        self.quantizing = [self._undisturbed(f"quantize, {name}", self.quantize(name)) for name in recipes]
        self.run = self.whole("quantize, gptq")
        evaluating = self._undisturbed("evaluate", self.evaluate(self.run))
        result = json.loads(self.whole("evaluate").read_text())
        results = 3 * 4 * result["windows"] * (result["window"] - 1)  # what is kept until the end
        self.evaluating = dataclasses.replace(evaluating, bytes=results)
        self.exporting = [self._undisturbed(f"export, {name}", self.export(name)) for name in targets]
        self.works = [*self.quantizing, self.evaluating, *self.exporting]

    def whole(self, name: str) -> Path:
        """What the job of that name made when nothing disturbed it."""
        return self.folder / name / "out"

    def _undisturbed(self, name: str, job: Callable[[Path], Job]) -> Work:
        out, count = self.whole(name), 0
        out.parent.mkdir()

        def counted(number: int) -> None:
            nonlocal count
            count = number

        def tell() -> None:
            print(f"\n{count}", flush=True)

        child = start(_then(job(out), tell), self.folder / "told.txt", operations(out.parent, counted))
        if child.end():
            raise SystemExit(f"A job that nothing disturbs fails:\n{child.words}")
        seconds = {"start": time.monotonic() - child.began}
        if (out / SUMMARY).exists():
            costs = json.loads((out / SUMMARY).read_text())["stages"]
            seconds = {"start": 0.1} | {stage: cost["seconds"] for stage, cost in costs.items() if stage in STAGES}
        size = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]))
        return Work(name, job, content(out), seconds, int(child.words.split()[-1]), size)

    def quantize(self, recipe: str, **changes: str) -> Callable[[Path], Job]:
        pairs = [f"--set={key}={value}" for key, value in (RECIPES[recipe] | changes).items()]
        words = ["quantize", self.model, "--recipe", recipe, "--seed", 0, "--calibration", CALIBRATION, *pairs]
        return lambda out: command(*words, "--out", out)

    def evaluate(self, run: Path) -> Callable[[Path], Job]:
        words = ["evaluate", run, "--text", self.text, "--reference", self.model, "--window", 64]
        return lambda out: command(*words, "--json", out)

    def export(self, target: str) -> Callable[[Path], Job]:
        return lambda out: _unverified(command("export", self.run, "--to", target, "--out", out))

    def on(self, *works: Work) -> list[Work]:
        """The jobs that a fault is tried on."""
        return [self.random.choice(works)] if self.sample else list(works)

    @property
    def time_left(self) -> bool:
        return time.monotonic() < self.until

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """A folder for one trial."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)

    def start(self, job: Job, folder: Path, *before: Job) -> Child:
        return start(job, folder / "told.txt", *before)

    def note(self, fault: str, work: str, place: str, fine: bool, child: Child, count: int = 1) -> None:
        self.tried[fault, work, place] += count
        self.survived[fault, work, place] += count * fine
        if not fine:
            print(f"--- {fault}, {work}, {place}; exit code {child.code}:\n{child.words[-3000:]}", flush=True)

    def goes_on(self, work: Work, out: Path) -> tuple[bool, Child]:
        """Whether the same command now ends in the bytes of the one that nothing disturbed."""
        child = self.start(work.job(out), out.parent)
        return child.end() == 0 and self.same(work, out, child), child

    def same(self, work: Work, out: Path, child: Child) -> bool:
        ours = content(out)
        names = [name for name in sorted(ours.keys() | work.whole.keys()) if ours.get(name) != work.whole.get(name)]
        expected = (out.name, log_of(out).name, "told.txt")
        leftovers = [file.name for file in out.parent.iterdir() if file.name not in expected]
        with child.told.open("a") as told:
            told.write(f"(other bytes than undisturbed: {', '.join(names)})\n" if names else "")
            told.write(f"(left behind: {', '.join(leftovers)})\n" if leftovers else "")
        return not names and not leftovers

    def moment(self, work: Work) -> tuple[str, float]:
        """A stage, and seconds into it."""
        stage = self.random.choice(sorted(work.seconds))
        return stage, self.random.random() * work.seconds[stage]


def _then(job: Job, then: Job) -> Job:
    """The job, and then something, also where the job ends the program."""

    def both() -> None:
        try:
            job()
        finally:
            then()

    return both


def _unverified(job: Job) -> Job:
    """As where no engine is installed."""

    def unverified() -> None:
        export.installed = lambda *_: False
        job()

    return unverified


def command(*words: object) -> Job:
    """`latmix …`, as on the command line."""

    def job() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["latmix", *map(str, words)]
        program()

    return job
