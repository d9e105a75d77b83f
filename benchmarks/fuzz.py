"""The fuzzing campaign: wrong inputs by hypothesis, and by atheris (guided by coverage) where that is installed.

    python benchmarks/fuzz.py --hypothesis 5000 --atheris 20000 --out docs/results/robustness-inputs.md

Targets and strategies are those of tests/fuzz. An input is taken or refused with a LatmixError; whatever else comes out
is counted as crashed, printed with its traceback, and makes the exit code 1. atheris: `pip install atheris`.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

WORDS = ("taken", "refused", "crashed")


class Counter:
    """Counts what becomes of inputs; remembers one input of every place that crashed."""

    def __init__(self, check: Callable[[bytes, Path], object]) -> None:
        self.check = check
        self.counts: collections.Counter[str] = collections.Counter()
        self.crashes: dict[str, str] = {}

    def __call__(self, data: bytes) -> None:
        from latmix.errors import LatmixError

        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            try:
                self.check(data, Path(folder))
                self.counts["taken"] += 1
            except LatmixError:
                self.counts["refused"] += 1
            except Exception as error:
                self.counts["crashed"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                self.crashes.setdefault(f"{where.filename}:{where.lineno}", f"{data!r:.2000}\n{traceback.format_exc()}")

    def result(self) -> dict[str, object]:
        return {**{word: self.counts[word] for word in WORDS}, "crashes": self.crashes}


def by_hypothesis(name: str, count: int) -> dict[str, object]:
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    counter = Counter(target.check)
    options = settings(
        max_examples=max(1, count // target.cost),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(0)(options(given(target.inputs)(lambda data: counter(data))))()
    return counter.result()


def by_atheris(name: str, count: int) -> None:
    """Prints the result as the last line. libFuzzer ends the process, so this is one of its own."""
    import atheris

    with atheris.instrument_imports(include=["latmix"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    runs = max(1, count // target.cost)
    counter = Counter(target.check)

    def one(data: bytes) -> None:
        counter(data)
        if counter.counts.total() == runs:
            print(json.dumps(counter.result()), flush=True)

    with tempfile.TemporaryDirectory() as corpus:
        for index, example in enumerate(target.examples()):
            (Path(corpus) / str(index)).write_bytes(example)
        longest = 2 * max(map(len, target.examples()))
        atheris.Setup([sys.argv[0], f"-runs={runs}", f"-max_len={longest}", "-seed=1", "-verbosity=0", corpus], one)
        atheris.Fuzz()


def atheris_elsewhere(name: str, count: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--guided", name, "--atheris", str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    results = [line for line in done.stdout.splitlines() if line.startswith('{"taken"')]
    if not results:
        raise SystemExit(f"atheris on {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(results[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypothesis", type=int, default=0, help="inputs of a target (a costly one gets fewer)")
    parser.add_argument("--atheris", type=int, default=0, help="the same, by atheris")
    parser.add_argument("--only", nargs="*", help="targets; all unless given")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--guided", help=argparse.SUPPRESS)  # the process that atheris ends
    wish = parser.parse_args()
    if wish.guided:
        return by_atheris(wish.guided, wish.atheris)
    from tests.fuzz.targets import TARGETS

    rows, crashed, began = [], 0, time.perf_counter()
    for name in wish.only or TARGETS:
        for tool, count, run in (
            ("hypothesis", wish.hypothesis, by_hypothesis),
            ("atheris", wish.atheris, atheris_elsewhere),
        ):
            if count:
                result = run(name, count)
                rows.append([name, tool, *(result[word] for word in WORDS)])
                crashed += result["crashed"]
                print(*rows[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
                for place, story in result["crashes"].items():
                    print(f"--- {place}\n{story}", flush=True)
    print(table := page(rows, sys.argv[1:]))
    if wish.out:
        wish.out.write_text(table, "utf-8")
    sys.exit(1 if crashed else 0)


def page(rows: list[list[object]], arguments: list[str]) -> str:
    total = sum(sum(row[2:]) for row in rows)
    crashed = sum(row[-1] for row in rows)
    lines = [
        "# Wrong inputs",
        "",
        f"{total:,} inputs, {crashed:,} of them ended otherwise than taken or refused with a documented error",
        f"({datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}). Regenerate:",
        "",
        f"    python benchmarks/fuzz.py {' '.join(arguments)}",
        "",
        "| what is read | tool | inputs | taken | refused | crashed |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row[0]} | {row[1]} | {sum(row[2:]):,} | " + " | ".join(f"{n:,}" for n in row[2:]) + " |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
