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

from latmix.analysis.candidates import ORTHOGONAL
from latmix.analysis.plots import plot, read_csv
from latmix.analysis.study import Question, analyze
from latmix.assets import DEMO_MODEL

PICTURES = {
    "errors": "Error E(T) of every map over block sizes 8 to 128",
    "perplexity": "Perplexity with the site's inputs quantized, over the same block sizes",
    "blocks": "Error in each block of the activation, for every map",
    "amplitudes": "Distribution of amplitudes before and after four of the maps",
}
GOAL = 0.6


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def page(folder: Path, name: str, about: dict[str, str], command: str) -> str:
    block = "32"
    errors = {row["map"]: row for row in read_csv(folder / "errors.csv") if row["block"] == block}
    maps = {row["map"]: row for row in read_csv(folder / "maps.csv")}
    perplexity = {(row["block"], row["map"]): row["perplexity"] for row in read_csv(folder / "perplexity.csv")}
    rows = []
    for map, row in errors.items():
        error, detail = float(row["error"]), maps[map]
        cells = [map, f"{error:.5f}", f"{float(row['of_best_orthogonal']):.3f}", f"{float(row['simple']) / error:.1f}"]
        cells += [f"{float(row['two_terms']) / error:.1f}", perplexity[block, map]]
        rows.append(
            [*cells, *(f"{float(detail[key]):.3f}" for key in ("kurtosis", "crest", "condition", "rms_variation"))]
        )
    head = [
        "map",
        "E(T)",
        "/ best orthogonal",
        "simple bound / E",
        "two-term bound / E",
        "perplexity",
        "kurtosis",
        "crest",
    ]
    best = min((float(errors[map]["error"]), map) for map in ORTHOGONAL)
    left = {
        map: float(errors[map]["of_best_orthogonal"]) for map in ("learned-affine", "learned-from-optimum", "optimum")
    }
    reached = min(left["learned-affine"], left["learned-from-optimum"])
    promise = float(maps["optimum"]["predicted"])
    verdict = "reached" if reached <= GOAL else "not reached"
    worst = sorted(read_csv(folder / "places.csv"), key=lambda row: -float(row["none"]))
    places = [
        [row["place"], *(f"{float(row[key]):.5f}" for key in ("none", "block-hadamard", "optimum"))] for row in worst
    ]
    pictures = "\n\n".join(f"![{text}](analysis-{name}/{key}.svg)" for key, text in PICTURES.items())
    return f"""# Where the error sits: {name}

`{about["format"]}`, site `{about["site"]}`, seed {about["seed"]}, {about["date"]}.
Maps are learned for E(T) itself, on activations of the first half of the text; everything is measured on those of the
second half. Regenerate:

    {command}

At block {block}:

{table(head + ["condition", "rms variation"], rows)}

Crest: mean of a block's largest square over the mean square. rms variation: spread over tokens of rms(Ax)/rms(x), the
gain error that RMSNorm makes of the folded map. Unquantized perplexity: {perplexity["0", "unquantized"]}.
Perplexity here quantizes the inputs at the site alone, through x → T⁻¹(Q(T(x))). Bounds and closed form:
[theory](../theory.md).

The goal, E(T) of the learned affine map 40 % below the best orthogonal one, is **{verdict}** here:
{1 - reached:.0%} below {best[1]}. The closed-form optimum, with nothing learned, is {1 - left["optimum"]:.0%} below it
(a negative number: above). Against a rotation without shift it promised {1 - promise:.0%} under white errors; what
learning gains beyond is the shape of the distribution.

Relative error (error over mean square) of every input, largest first, at the optimum of its own:

{table(["input / layer", "none", "block-hadamard", "optimum"], places)}

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
        analyze(args.model, folder, Question(args.text, separator))
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
