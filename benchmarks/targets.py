"""What it costs to learn for an engine: the same recipe without what that engine cannot serve.

    python benchmarks/targets.py --out docs/results/targets.md

Evaluation text that no recipe saw; the model and the texts that ship with latmix unless `--model` is given. A finished
run is not computed again (`--runs` keeps them); one of another recipe is refused.
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
from latmix.assets import DEMO_MODEL, EVALUATION
from latmix.export.source import open_run
from latmix.recipe import Recipe, override
from latmix.recipes import find
from latmix.targets import TARGETS, respelled


def variants(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The recipe as published, and what vLLM serves of it: either the online transform or the shift of the stream."""
    stream = {
        shift: {"folded.residual": respelled(recipe.folded["residual"], shift)} for shift in ("full", "layers", "none")
    }
    return {
        "shift to the head; online at down": stream["full"],
        "no shift of the stream; online at down": stream["none"],
        "shift within the layers; nothing online": stream["layers"] | {"online.down": "none"},
    }


def served_by(run: Path) -> str:
    source = open_run(run)
    return ", ".join(name for name in TARGETS if not TARGETS[name].refusals(source.layout, source.recipe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--recipe", default="latmix-lu")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs/targets"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in args.set)
    lines = []
    for place, (name, changes) in enumerate(variants(find(args.recipe)).items()):
        results = []
        for seed in range(args.seeds):
            folder, chosen = args.runs / f"{args.recipe}-{place}-{seed}", settings | changes
            wished = dataclasses.replace(override(find(args.recipe), chosen), seed=seed)
            if folder.exists() and find(str(folder / "recipe.json")) != wished:
                sys.exit(f"'{folder}' holds another recipe; choose another --runs or remove it.")
            if not folder.exists():
                latmix.quantize(args.model, folder, args.recipe, None, seed, chosen)
            results.append(latmix.evaluate(folder, EVALUATION, args.model))
        kl = [result.kl.mean for result in results if result.kl]
        perplexity = [result.perplexity.mean for result in results]
        lines.append(f"| {name} | {cell(perplexity, 3)} | {cell(kl, 4)} | {served_by(folder)} |")
        print(lines[-1], flush=True)
    command = shlex.join(["python", "benchmarks/targets.py", *sys.argv[1:]])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        f"""# What learning for an engine costs

Recipe `{args.recipe}` with and without what engines cannot serve (the values keep their shift); mean ± standard
deviation over {args.seeds} seeds,
text that no run saw. KL in nats per token to full precision. {datetime.date.today()}, {platform.machine()}, torch
{torch.__version__}. Regenerate:

    {command}

| variant | perplexity | KL | can be exported to |
|---|---|---|---|
"""
        + "\n".join(lines)
        + "\n",
        "utf-8",
    )


def cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    main()
