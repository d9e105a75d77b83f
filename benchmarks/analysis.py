"""Where the error sits, on one model: figures 2a, 2b and 2c of the paper, their data, and a page about them.

    python benchmarks/analysis.py --name demo
    python benchmarks/analysis.py --name stories260K --model stories260K --text tinystories.txt --separator '\n\n'

Without `--model`: the model and the calibration text that ship with latmix. Writes docs/results/analysis-NAME.md and
the folder docs/results/analysis-NAME beside it, which must not exist. `--page-only`: the page anew from the folder.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from latmix.analysis.candidates import CANDIDATES, ORTHOGONAL
from latmix.analysis.optimum import closed_form
from latmix.analysis.plots import plot, read_csv
from latmix.analysis.study import Question, analyze, halves, write_csv
from latmix.assets import CALIBRATION, DEMO_MODEL
from latmix.data import read_text
from latmix.eval.activations import collect, places
from latmix.eval.errors import error
from latmix.model.fold import absorb_gains
from latmix.model.load import load
from latmix.model.parts import layers
from latmix.numerics import parse_format

PICTURES = {
    "errors": "Error E(T) of every map over block sizes 8 to 128",
    "perplexity": "Perplexity with the site's inputs quantized, over the same block sizes",
    "blocks": "Error in each block of the activation, for every map",
    "amplitudes": "Distribution of amplitudes before and after four of the maps",
}
GOAL = 0.6


OWN = ("block-hadamard", "learned-rotation", "optimum", "learned-affine", "learned-from-optimum")


def own_maps(model: Path, folder: Path, question: Question) -> None:
    """E(T) of maps of its own for every input of the residual stream, in `sites.csv`: what one map for all of them,
    which is what can be folded, gives up."""
    loaded, fmt = load(model), parse_format(question.format)
    absorb_gains(loaded.model, loaded.arch)
    corpus = read_text(question.text or CALIBRATION, question.separator)
    taught, seen = (collect(loaded, part, question.tokens, question.seed) for part in halves(loaded, corpus, question))
    rows = []
    for place in places(loaded.arch, len(layers(loaded.model, loaded.arch)), "residual"):
        found = {name: error(CANDIDATES[name](taught[place], fmt, question.seed), seen[place], fmt) for name in OWN}
        rows.append({"place": str(place), "promise": closed_form(taught[place]).ratio, **found})
        print(rows[-1], flush=True)
    write_csv(folder / "sites.csv", rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def figures(folder: Path, block: str) -> str:
    """The table of maps at one block size."""
    maps = {row["map"]: row for row in read_csv(folder / "maps.csv")}
    perplexity = {(row["block"], row["map"]): row["perplexity"] for row in read_csv(folder / "perplexity.csv")}
    rows = []
    for row in read_csv(folder / "errors.csv"):
        if row["block"] == block:
            map, error = row["map"], float(row["error"])
            cells = [
                map,
                f"{error:.5f}",
                f"{float(row['of_best_orthogonal']):.3f}",
                f"{float(row['simple']) / error:.1f}",
            ]
            cells += [f"{float(row['two_terms']) / error:.1f}", f"{float(perplexity[block, map]):.3f}"]
            details = ("kurtosis", "crest", "condition", "rms_variation")
            rows.append([*cells, *(f"{float(maps[map][key]):.3f}" for key in details)])
    head = ["map", "E(T)", "/ best orthogonal", "simple bound / E", "two-term bound / E", "perplexity"]
    return table([*head, "kurtosis", "crest", "condition", "rms variation"], rows)


def goal(folder: Path, block: str) -> str:
    """Whether E(T) of the learned affine map is 40 % below the best orthogonal one, at the site and at each input."""
    errors = {row["map"]: float(row["error"]) for row in read_csv(folder / "errors.csv") if row["block"] == block}
    promise = next(float(row["predicted"]) for row in read_csv(folder / "maps.csv") if row["predicted"])
    best, name = min((errors[map], map) for map in ORTHOGONAL)
    learned = min(errors["learned-affine"], errors["learned-from-optimum"])
    rows, reached, sites = [], [], read_csv(folder / "sites.csv")
    for row in sites:
        found = {key: float(row[key]) for key in OWN}
        orthogonal = min(found["block-hadamard"], found["learned-rotation"])
        affine = min(found["learned-affine"], found["learned-from-optimum"])
        if affine / orthogonal <= GOAL:
            reached.append(row["place"])
        cells = [row["place"], f"{orthogonal:.5f}", f"{found['optimum']:.5f}", f"{affine:.5f}"]
        rows.append([*cells, f"{affine / orthogonal:.2f}", f"{float(row['promise']):.2f}"])
    head = ["input / layer", "best orthogonal", "optimum", "learned affine", "ratio", "promised"]
    verdict = "reached" if learned / best <= GOAL else "not reached"
    where = f" ({', '.join(reached)})" if reached else ""
    return f"""The goal, E(T) of the learned affine map 40 % below the best orthogonal one, is **{verdict}**
with one map for the whole residual stream: {1 - learned / best:.0%} below {name}.
The closed-form optimum, with nothing learned, is {1 - errors["optimum"] / best:.0%} below it (negative: above).
Against a rotation without shift it promised {1 - promise:.0%}, and under white errors no affine map can do better;
learning adds what the shape of the distribution gives, to the rotation as to the affine map.

With a map of its own for every input that reads the stream, which cannot be folded, it is reached at
{len(reached)} of {len(sites)} inputs{where}. "Promised" is the closed form's ratio to a rotation;
it is small where the spectrum of the activations is steep or their mean is large.

{table(head, rows)}"""


def page(folder: Path, name: str, about: dict[str, str], command: str) -> str:
    block = str(parse_format(about["format"]).block)
    unquantized = float(read_csv(folder / "perplexity.csv")[0]["perplexity"])
    worst = sorted(read_csv(folder / "places.csv"), key=lambda row: -float(row["none"]))
    errors = [
        [row["place"], *(f"{float(row[key]):.5f}" for key in ("none", "block-hadamard", "optimum"))] for row in worst
    ]
    pictures = "\n\n".join(f"![{text}](analysis-{name}/{key}.svg)" for key, text in PICTURES.items())
    return f"""# Where the error sits: {name}

`{about["format"]}`, site `{about["site"]}`, seed {about["seed"]}, {about["date"]}.
Maps are learned for E(T) itself, on activations of the first half of the text; everything is measured on those of the
second half. Regenerate:

    {command}

At block {block}:

{figures(folder, block)}

Crest: mean of a block's largest square over the mean square. rms variation: spread over tokens of rms(Ax)/rms(x), the
gain error that RMSNorm makes of the folded map. Unquantized perplexity: {unquantized:.3f}.
Perplexity here quantizes the inputs at the site alone, through x → T⁻¹(Q(T(x))). Bounds and closed form:
[theory](../theory.md).

## What an affine map wins

{goal(folder, block)}

## Which inputs lose most

Relative error (error over mean square) of every input, largest first; the optimum is each one's own:

{table(["input / layer", "none", "block-hadamard", "optimum"], errors)}

## Figures

{pictures}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--separator")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--page-only", action="store_true")
    args = parser.parse_args()
    folder = args.results / f"analysis-{args.name}"
    if not args.page_only:
        separator = args.separator.replace("\\n", "\n") if args.separator else None
        question = Question(args.text, separator)
        analyze(args.model, folder, question)
        own_maps(args.model, folder, question)
        words = [word for word in sys.argv[1:] if word != "--page-only"]
        about = json.loads((folder / "analysis.json").read_text())
        about |= {"model": args.model.name, "text": Path(about["text"]).name, "command": shlex.join(words)}
        (folder / "analysis.json").write_text(json.dumps(about, indent=2) + "\n")
        plot(folder)
    about = json.loads((folder / "analysis.json").read_text())
    text = page(folder, args.name, about, f"python benchmarks/analysis.py {about['command']}")
    folder.with_suffix(".md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
