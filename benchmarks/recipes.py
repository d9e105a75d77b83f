"""Recipes side by side at equal terms: one calibration text, one evaluation text, three seeds, mean and spread.

    python benchmarks/recipes.py --out docs/results/demo.md
    python benchmarks/recipes.py --model stories260K --split tinystories.txt --separator '\n\n' --window 256 \
        --set calibration.windows=130 calibration.held_out=30 --out docs/results/stories260K.md

Without `--model`: the model and the texts that ship with latmix. `--split FILE` calibrates on the first 70 % of the
documents of one text and reports on the rest. A finished run is not computed again (`--runs`
keeps them); one of another recipe is refused.
"""

import argparse
import dataclasses
import datetime
import os
import platform
import shlex
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import latmix
from latmix.assets import CALIBRATION, DEMO_MODEL, EVALUATION
from latmix.pipeline import Evaluation
from latmix.recipe import override
from latmix.recipes import find

RECIPES = ("rtn", "gptq", "quarot", "block-hadamard", "latmix-lu", "latmix-qr")
CALIBRATION_SHARE = 0.7


def split(text: Path, separator: str, folder: Path) -> tuple[Path, Path]:
    documents = text.read_text("utf-8").split(separator)
    cut = int(CALIBRATION_SHARE * len(documents))
    parts = folder / "calibration.txt", folder / "evaluation.txt"
    for part, chosen in zip(parts, (documents[:cut], documents[cut:]), strict=True):
        part.write_text(separator.join(chosen), "utf-8")
    return parts


def cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def row(name: str, results: list[Evaluation], seconds: list[float], gptq_kl: float | None) -> str:
    kl = [result.kl.mean for result in results if result.kl]
    ratio = "" if gptq_kl is None else f"{statistics.mean(kl) / gptq_kl:.2f}"
    agreement = [100 * result.top1_agreement.mean for result in results if result.top1_agreement]
    perplexity = cell([result.perplexity.mean for result in results], 3)
    return f"| {name} | {perplexity} | {cell(kl, 4)} | {ratio} | {cell(agreement, 1)} | {cell(seconds, 0)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--split", type=Path)
    parser.add_argument("--separator")
    parser.add_argument("--window", type=int)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, help="default: benchmark-runs/NAME, NAME as in --out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.runs = args.runs or Path("benchmark-runs") / args.out.stem

    args.runs.mkdir(parents=True, exist_ok=True)
    separator = args.separator.replace("\\n", "\n") if args.separator else None
    texts = split(args.split, separator or "\n\n", args.runs) if args.split else (CALIBRATION, EVALUATION)
    settings = dict(pair.split("=", 1) for pair in args.set)
    if separator:
        settings["calibration.separator"] = separator
    if args.window:
        settings["calibration.window"] = str(args.window)

    original = latmix.evaluate(args.model, texts[1], args.model, args.window, separator)
    lines = [row("full precision", [original], [0.0], None)]
    gptq_kl = None
    for name in args.recipes:
        results, seconds = [], []
        chosen = {
            key: value for key, value in settings.items() if find(name).learning or not key.startswith("learning")
        }
        for seed in range(args.seeds):
            folder = args.runs / f"{name}-{seed}"
            wished = dataclasses.replace(override(find(name), chosen), seed=seed)
            if folder.exists() and find(str(folder / "recipe.json")) != wished:
                sys.exit(f"'{folder}' holds another recipe; choose another --runs or remove it.")
            if not folder.exists():
                latmix.quantize(args.model, folder, name, texts[0], seed, chosen)
            stages = latmix.rundir.read_json(folder / "summary.json")["stages"]
            seconds.append(sum(stage["seconds"] for stage in stages.values()))
            results.append(latmix.evaluate(folder, texts[1], args.model, args.window, separator))
        if name == "gptq":
            gptq_kl = statistics.mean(result.kl.mean for result in results if result.kl)
        lines.append(row(name, results, seconds, gptq_kl))
        print(lines[-1], flush=True)

    command = shlex.join(["python", "benchmarks/recipes.py", *sys.argv[1:]])
    format = find("gptq").activations
    machine = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    head = f"""Weights and activations `{format}`; {original.windows} windows of {original.window} tokens no recipe saw;
mean ± standard deviation over {args.seeds} seeds. KL in nats per token to full precision; "/ GPTQ": ratio of mean KL.
{datetime.date.today()}, {machine}, torch {torch.__version__}. Regenerate:

    {command}

| recipe | perplexity | KL | / GPTQ | top-1 agreement, % | seconds |
|---|---|---|---|---|---|
"""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(head + "\n".join(lines) + "\n", "utf-8")
    print(args.out.read_text("utf-8"))


if __name__ == "__main__":
    main()
