"""What each part of latmix-plus brings: alone, and on top of the rest.

    python benchmarks/ablation.py MODEL --out comparisons/ablation [--seeds 3] [--steps N] [options of latmix compare]

Every row is latmix-plus with parts taken away or put in, written as a recipe file into the output folder and run by
`latmix compare`: resumable, on equal terms, with spread over seeds and the cost in time. `--windows 32,64` adds
latmix-plus and GPTQ at fewer calibration windows. To see what another domain makes of the same runs, run it again with
another `--text`: only the evaluation is new.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

from latmix.recipe import Recipe, Tuning
from latmix.recipes import find
from latmix.rundir import write_text

PLUS = find("latmix-plus")
assert PLUS.tuning is not None
NOTHING = dataclasses.replace(PLUS.tuning, kept=(), biases=(), codes=False)
MAPS = find("latmix-qr")


def with_tuning(name: str, base: Tuning, recipe: Recipe = PLUS, **parts: object) -> Recipe:
    return dataclasses.replace(recipe, name=name, tuning=dataclasses.replace(base, **parts))  # type: ignore[arg-type]


def variants(everything: Tuning, nothing: Tuning) -> list[Recipe]:
    """In the order of the table: the start, one part at a time, everything, everything but one part, other starts."""
    kept, biases = everything.kept, everything.biases
    alone: dict[str, dict[str, object]] = {
        "gains": {"kept": ("gains",)},
        "biases": {"biases": biases},
        "embedding": {"kept": ("embedding",)},
        "head": {"kept": ("head",)},
        "codes": {"codes": True, "scales_lr": 0.0},
        "codes, scales": {"codes": True},
    }
    without: dict[str, dict[str, object]] = {
        **{part: {"kept": tuple(other for other in kept if other != part)} for part in kept},
        "biases": {"biases": ()},
        "scales": {"scales_lr": 0.0},
        "codes, scales": {"codes": False},
        "the mean of its steps": {"average": False},
    }
    gptq = dataclasses.replace(PLUS, folded={}, online={})
    return [
        dataclasses.replace(PLUS, name="nothing tuned", tuning=None),
        *(with_tuning(f"only {part}", nothing, **parts) for part, parts in alone.items()),
        with_tuning("latmix-plus", everything),
        *(with_tuning(f"without {part}", everything, **parts) for part, parts in without.items()),
        with_tuning("after latmix-qr", everything, MAPS),
        with_tuning("after plain GPTQ", everything, gptq),
        with_tuning("after rounding to nearest", everything, dataclasses.replace(PLUS, quantizer="rtn")),
    ]


def at_windows(recipe: Recipe, count: int) -> Recipe:
    calibration = dataclasses.replace(recipe.calibration, windows=count)
    return dataclasses.replace(recipe, name=f"{recipe.name}, {count} windows", calibration=calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=PLUS.tuning.steps, help="of tuning, in every row")
    parser.add_argument("--windows", default="", help="sizes of calibration to scale over, separated by commas")
    parser.add_argument("--rows", default="", help="only the rows of these names, separated by semicolons")
    args, options = parser.parse_known_args()
    everything, nothing = (dataclasses.replace(base, steps=args.steps) for base in (PLUS.tuning, NOTHING))
    recipes = [find("gptq"), *variants(everything, nothing)]
    plus = with_tuning("latmix-plus", everything)
    for count in map(int, filter(None, args.windows.split(","))):
        recipes += [at_windows(find("gptq"), count), at_windows(plus, count)]
    if args.rows:
        recipes = [recipe for recipe in recipes if recipe.name in ["gptq", *args.rows.split(";")]]
    files = []
    for recipe in recipes:
        files.append(args.out / "recipes" / f"{recipe.name.replace(' ', '-').replace(',', '')}.json")
        write_text(files[-1], recipe.to_json())
    command = ["compare", str(args.model), "--recipes", ",".join(map(str, files)), "--out", str(args.out), *options]
    sys.exit(subprocess.run([sys.executable, "-m", "latmix", *command]).returncode)


if __name__ == "__main__":
    main()
