"""What it costs to learn for an engine: the same recipe without what that engine cannot serve.

    python benchmarks/targets.py --out docs/results/targets.md

A recipe as it is, then as `--set target=…` changes it. What is made for llama.cpp has nothing online, so vLLM serves it
too: its row says whether the default for vLLM, which keeps the online transform, is the better choice there. Evaluation
text that no recipe saw; the model and the texts that ship with latmix unless `--model` is given. A finished run is not
computed again (`--runs` keeps them); one of another recipe is refused.
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
from engines import changed, fitted

import latmix
from latmix.assets import DEMO_MODEL, EVALUATION
from latmix.export.source import open_run
from latmix.recipe import Recipe, override
from latmix.recipes import find
from latmix.targets import TARGETS

VARIANTS = (None, "compressed-tensors", "gguf")


def served_by(run: Path) -> str:
    source = open_run(run)
    return ", ".join(name for name in TARGETS if not TARGETS[name].refusals(source.layout, source.recipe))


def evaluated(recipe: Recipe, folder: Path, model: Path) -> latmix.Evaluation:
    if not folder.exists():
        latmix.quantize(model, folder, recipe)
    if (kept := find(str(folder / "recipe.json"))) != recipe:
        sys.exit(f"'{folder}' holds another recipe ({kept.digest}); choose another --runs or remove it.")
    return latmix.evaluate(folder, EVALUATION, model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--recipes", nargs="*", default=["latmix-plus", "latmix-lu"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs/targets"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = []
    for name in args.recipes:
        wished = override(find(name), dict(pair.split("=", 1) for pair in args.set))
        for to in VARIANTS:
            recipe = fitted(args.model, wished, to) if to else wished
            folders = [args.runs / f"{name}-{to or 'plain'}-{seed}" for seed in range(args.seeds)]
            results = [
                evaluated(dataclasses.replace(recipe, seed=seed), folder, args.model)
                for seed, folder in enumerate(folders)
            ]
            kl = [result.kl.mean for result in results if result.kl]
            figures = f"{cell([result.perplexity.mean for result in results], 3)} | {cell(kl, 4)}"
            about = f"{f'`target={to}`' if to else 'none'} | {changed(wished, recipe)}"
            lines.append(f"| {name} | {about} | {figures} | {served_by(folders[0])} |")
            print(lines[-1], flush=True)
    command = shlex.join(["python", "benchmarks/targets.py", *sys.argv[1:]])
    about = f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        PAGE.format(seeds=args.seeds, about=about, command=command, lines="\n".join(lines)), encoding="utf-8"
    )


def cell(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


PAGE = """# What learning for an engine costs

A recipe as it is and as `--set target=…` changes it, at its default settings; mean ± standard deviation over {seeds}
seeds, text that no run saw. KL in nats per token to full precision. Where llama.cpp's row can be exported to
`compressed-tensors` too, it is vLLM's other choice: nothing online, biases everywhere.
{about}. Regenerate:

    {command}

| recipe | made for | changed for it | perplexity | KL | can be exported to |
|---|---|---|---|---|---|
{lines}
"""

if __name__ == "__main__":
    main()
