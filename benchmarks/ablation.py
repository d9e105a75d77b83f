"""What each part of latmix-plus brings: alone, and on top of the rest.

    python benchmarks/ablation.py MODEL --out comparisons/ablation [--seeds 3] [--share 1] [options of latmix compare]

Every row is latmix-plus with parts taken away or put in, run by `latmix.compare`: resumable, on equal terms, with
spread over seeds and the cost in time. Rows that differ in tuning alone share what comes before it: a run that is
stopped there goes on with another tuning, to the same bytes. `--share 0.25` takes that share of its steps and of the
text that the model writes itself, in every row. `--windows 32,64` adds latmix-plus and GPTQ at fewer
calibration windows. To see what another domain makes of the same runs, run it again with another `--text`: only the
evaluation is new.
"""

import argparse
import dataclasses
import itertools
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from latmix import quantize
from latmix.comparison import Texts, compare
from latmix.comparison.plan import Cell, Measures, cells
from latmix.progress import Progress
from latmix.recipe import Recipe, Tuning
from latmix.recipes import find
from latmix.rundir import partial_of, write_text

PLUS = find("latmix-plus")


def shortened(share: float) -> Recipe:
    """latmix-plus with that share of its steps and of the text that the model writes itself."""
    assert PLUS.learning is not None and PLUS.tuning is not None
    return dataclasses.replace(
        PLUS,
        learning=dataclasses.replace(PLUS.learning, steps=round(share * PLUS.learning.steps)),
        tuning=dataclasses.replace(PLUS.tuning, steps=round(share * PLUS.tuning.steps)),
        calibration=dataclasses.replace(PLUS.calibration, generated=round(share * PLUS.calibration.generated)),
    )


def variants(plus: Recipe) -> list[Recipe]:
    """In the order of the table: the start, one part at a time, everything, everything but one part, other starts."""
    assert plus.tuning is not None
    everything = plus.tuning
    nothing = dataclasses.replace(everything, kept=(), biases=(), codes=False)
    parts: dict[str, dict[str, tuple[object, object]]] = {  # key of the recipe → alone, and what the rest is
        "gains": {"kept": (("gains",), tuple(part for part in everything.kept if part != "gains"))},
        "biases": {"biases": (everything.biases, ())},
        "embedding and head": {"kept": (("embedding", "head"), ("gains",))},
        "codes": {"codes": (True, False)},
    }
    starts: dict[str, dict[str, object]] = {
        "without text of its own": {"calibration": dataclasses.replace(plus.calibration, generated=0)},
        "without maps": {"folded": find("block-hadamard").folded, "learning": None},
        "with maps in LU form": {"folded": find("latmix-lu").folded},
        "with weights rounded to nearest": {"quantizer": "rtn"},
    }

    def with_tuning(name: str, base: Tuning, **changes: object) -> Recipe:
        return dataclasses.replace(plus, name=name, tuning=dataclasses.replace(base, **changes))  # type: ignore[arg-type]

    return [
        dataclasses.replace(plus, name="nothing tuned", tuning=None),
        *(
            with_tuning(f"only {name}", nothing, **{key: on for key, (on, _) in part.items()})
            for name, part in parts.items()
        ),
        plus,
        *(
            with_tuning(f"without {name}", everything, **{key: off for key, (_, off) in part.items()})
            for name, part in parts.items()
        ),
        with_tuning("without the mean of its steps", everything, average=False),
        with_tuning("without damping", everything, damping=0.0),
        *(dataclasses.replace(plus, name=name, **changes) for name, changes in starts.items()),  # type: ignore[arg-type]
    ]


def at_windows(recipe: Recipe, count: int) -> Recipe:
    calibration = dataclasses.replace(recipe.calibration, windows=count)
    return dataclasses.replace(recipe, name=f"{recipe.name}, {count} windows", calibration=calibration)


class Reached(Exception):
    """A run has come to its tuning."""


class Before(Progress):
    """Stops a run when tuning is about to take its first step."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        if name == Tuning.key:
            raise Reached


def share(planned: Iterable[Cell], trunks: Path) -> None:
    """Put what comes before tuning into the folders of those cells that have it in common with others."""
    waiting = [cell for cell in planned if cell.recipe and not cell.run.exists()]
    for trunk, each in itertools.groupby(sorted(waiting, key=start), start):
        alike = [cell for cell in each if not partial_of(cell.run).exists()]
        tuned = next((cell for cell in alike if cell.recipe and cell.recipe.tuning), None)
        if tuned is None or len(alike) < 2:
            continue
        whole = partial_of(trunks / trunk)
        try:
            quantize(tuned.model, trunks / trunk, tuned.recipe or "", tuned.calibration, progress=Before())
        except Reached:
            for cell in alike:
                shutil.copytree(whole, partial_of(cell.run))
        shutil.rmtree(whole)


def start(cell: Cell) -> str:
    """Names what a cell does before tuning."""
    assert cell.recipe is not None
    return dataclasses.replace(cell.recipe, name="", tuning=None).digest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of all steps and of the text that the model writes")
    parser.add_argument("--windows", default="", help="sizes of calibration to scale over, separated by commas")
    parser.add_argument("--rows", default="", help="only the rows of these names, separated by semicolons")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--split", type=float)
    parser.add_argument("--separator")
    parser.add_argument("--window", type=int)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()
    plus = shortened(args.share)
    recipes = [find("gptq"), *variants(plus)]
    for count in map(int, filter(None, args.windows.split(","))):
        recipes += [at_windows(find("gptq"), count), at_windows(plus, count)]
    if args.rows:
        recipes = [recipe for recipe in recipes if recipe.name in ["gptq", *args.rows.split(";")]]
    files = []
    for recipe in recipes:
        files.append(str(args.out / "recipes" / f"{recipe.name.replace(' ', '-').replace(',', '')}.json"))
        write_text(Path(files[-1]), recipe.to_json())
    texts = Texts(args.calibration, args.text, args.split, args.separator and args.separator.replace("\\n", "\n"))
    settings = dict(pair.split("=", 1) for pair in args.set)
    calibration, text = texts.files(args.out)
    cut = {"calibration.separator": texts.separator} if texts.separator else {}
    cut |= {"calibration.window": str(args.window)} if args.window else {}
    measures = Measures(str(text), texts.separator, args.window)
    share(cells(args.model, files, args.out, args.seeds, calibration, measures, settings | cut), args.out / "trunks")
    head = f"Regenerate:\n\n    {shlex.join(['python', *sys.argv])}\n"
    terms = {"seeds": args.seeds, "texts": texts, "window": args.window, "settings": settings}
    rows = compare(args.model, files, args.out, **terms, jobs=args.jobs, head=head)
    print((args.out / "table.md").read_text("utf-8"))
    sys.exit(any(row.failures for row in rows))


if __name__ == "__main__":
    main()
