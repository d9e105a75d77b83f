"""One quantized model in latmix, transformers, vLLM and llama.cpp: the same tokens, perplexity and KL of each.

    scripts/engines.sh ENGINES
    python benchmarks/engines.py --engines ENGINES --out docs/results/engines.md

Each recipe is learned for the target it is exported to. The model and texts are those that ship with latmix unless
`--model` is given; windows and tokens are those of the export's fingerprint. Without `--engines` only transformers
runs.
A finished run or export is not made again (`--runs` keeps them).
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import latmix
from latmix import export as exports
from latmix.assets import DEMO_MODEL
from latmix.export import fingerprint
from latmix.export.verify import Verdict, ask
from latmix.model.load import load

PLACES = (("compressed-tensors", "vllm"), ("compressed-tensors", "transformers"), ("transformers", "transformers"))
PLACES += (("gguf", "llama"),)


def made(model: Path, recipe: str, to: str, seed: int, runs: Path, settings: dict[str, str]) -> Path:
    run, out = runs / f"{recipe}-for-{to}", runs / f"{recipe}-{to}"
    if not run.exists():
        latmix.quantize(model, run, recipe, None, seed, settings | {"target": to})
    if not out.exists():
        exports.export(run, to, out)
    return out


def divergence(model: Path, folder: Path, engine: str, python: str | None) -> float:
    """Mean KL(full precision ‖ engine) on the fingerprint's windows, over the whole vocabulary."""
    kept = fingerprint.read(folder)
    p = fingerprint.answers(load(model), kept.tensors["windows"]).double()
    q = torch.from_numpy(ask(folder, engine, kept.request, python)["logprobs"]).double()[..., : p.shape[-1]]
    return float((p.exp() * (p - q)).sum(-1).mean())


def row(recipe: str, to: str, verdict: Verdict, kl: float) -> str:
    agrees = "yes" if verdict.passed else "**no**"
    return (
        f"| {recipe} | {to} | {verdict.engine} | {verdict.perplexity:.4f} | {verdict.run_perplexity:.4f} | "
        f"{verdict.run_weights_only:.4f} | {kl:.4f} | {verdict.kl:.1e} | {verdict.greedy} of {verdict.of} | {agrees} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--recipes", nargs="+", default=("gptq", "quarot", "latmix-lu"))
    parser.add_argument("--engines", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs/engines"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in args.set)
    lines, sizes = [], []
    for recipe in args.recipes:
        for to, engine in PLACES:
            python = None if engine == "transformers" else args.engines and str(args.engines / engine / "bin/python")
            if engine != "transformers" and not (python and Path(python).exists()):
                lines.append(f"| {recipe} | {to} | {engine}: not run | | | | | | | |")
                continue
            chosen = {k: v for k, v in settings.items() if "learning" not in k or "latmix" in recipe}
            folder = made(args.model, recipe, to, args.seed, args.runs, chosen)
            manifest = exports.open_export(folder)
            if engine not in manifest["engines"]:
                lines.append(f"| {recipe} | {to} | {engine}: refused, it ignores online transforms | | | | | | | |")
                continue
            verdict = exports.verify(folder, engine, python)
            lines.append(row(recipe, to, verdict, divergence(args.model, folder, engine, python)))
            print(lines[-1], flush=True)
            weight = exports.weight_of(folder, manifest)
            sizes.append(f"| {recipe} | {to} | {weight.bytes:,} | {weight.bf16_bytes:,} |")
    command = shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = f"""# One model, four engines

Each recipe learned for its target (seed {args.seed}), exported, loaded by the engine, asked for the same
{fingerprint.WINDOWS} windows of at most {fingerprint.WINDOW} tokens of text that no run saw. "W4A4" and "W4A16" are
the run's own perplexity with and without rounded activations, "KL" is to full precision, "KL to run" to the run's own
answers, in nats per token. All in float32. {datetime.date.today()}, {platform.machine()}, torch {torch.__version__}.
Regenerate:

    {command}

| recipe | export | engine | perplexity | run W4A4 | run W4A16 | KL | KL to run | same greedy tokens | agrees |
|---|---|---|---|---|---|---|---|---|---|
"""
    table = "\n".join(lines) + "\n\n| recipe | export | bytes of tensors | in bfloat16 |\n|---|---|---|---|\n"
    args.out.write_text(text + table + "\n".join(dict.fromkeys(sizes)) + "\n", "utf-8")
    print(args.out.read_text("utf-8"))


if __name__ == "__main__":
    main()
