"""Quantized models in latmix, transformers, vLLM and llama.cpp: the same tokens, perplexity and KL of each.

    scripts/engines.sh ENGINES
    python benchmarks/engines.py --engines ENGINES --out docs/results/engines.md

Each recipe is made for the target it is exported to, and what a target refuses is a row that says why. The model is the
one that ships with latmix; `--models` adds folders. Texts, windows and tokens are those of the export's fingerprint.
Without `--engines` only transformers runs. A finished run or export is not made again (`--runs` keeps them).
"""

import argparse
import datetime
import functools
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
from latmix.errors import LatmixError
from latmix.export import fingerprint
from latmix.export.verify import ask, judge, record
from latmix.model.load import load

PLACES = (("compressed-tensors", "vllm"), ("compressed-tensors", "transformers"), ("transformers", "transformers"))
PLACES += (("gguf", "llama"),)
CASES: tuple[tuple[str, dict[str, str]], ...] = (
    ("gptq", {}),
    ("quarot", {}),
    ("latmix-lu", {}),
    ("gptq", {"activations": "none"}),
    ("gptq", {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3:scale=rceil"}),
    ("gptq", {"weights": "nvfp4", "activations": "none"}),
)


def made(model: Path, recipe: str, changes: dict[str, str], to: str, args: argparse.Namespace) -> Path:
    """The exported folder. Raises: LatmixError: the target refuses."""
    settings = dict(pair.split("=", 1) for pair in args.set)
    settings = {key: value for key, value in settings.items() if "learning" not in key or "latmix" in recipe}
    name = "-".join([model.name, recipe, *changes.values()]).replace(":", "_").replace("=", "_")
    run, out = args.runs / f"{name}-for-{to}", args.runs / f"{name}-{to}"
    if not run.exists():
        latmix.quantize(model, run, recipe, None, args.seed, settings | changes | {"target": to})
    return out if out.exists() else exports.export(run, to, out)


@functools.cache
def full_precision(model: Path, folder: Path) -> torch.Tensor:
    """Log-probabilities of the unquantized model on the windows of a fingerprint, which all its exports share."""
    original = load(model).model
    with torch.no_grad():
        each = [original(row[None]).logits[0, :-1].double() for row in fingerprint.read(folder).tensors["windows"]]
    return torch.stack(each).log_softmax(-1)


def row(model: Path, to: str, engine: str, folder: Path, python: str | None) -> str:
    """What the engine answered, in columns. Raises: LatmixError: the engine cannot run it."""
    kept = fingerprint.read(folder)
    answer = ask(folder, engine, kept.request, python)
    verdict = judge(kept, answer, engine)
    record(folder, engine, verdict)
    p = full_precision(model, folder)
    kl = float((p.exp() * (p - torch.from_numpy(answer["logprobs"]).double()[..., : p.shape[-1]])).sum(-1).mean())
    numbers = (verdict.perplexity, verdict.run_perplexity, verdict.run_weights_only, kl)
    agrees = "yes" if verdict.passed else "**no**"
    start = " | ".join([verdict.engine, *(f"{number:.4f}" for number in numbers)])
    return f"{start} | {verdict.kl:.1e} | {verdict.greedy} of {verdict.of} | {agrees} |"


def rows(model: Path, recipe: str, changes: dict[str, str], args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Of the table, and of the table of sizes."""
    found, sizes = [], []
    label = " ".join([recipe, *(f"{key}={value}" for key, value in changes.items())])
    for to, engine in PLACES:
        start, empty = f"| {model.name} | {label} | {to} | ", " | | | | | | | |"
        python = None if engine == "transformers" else args.engines and str(args.engines / engine / "bin/python")
        if engine != "transformers" and not (python and Path(python).exists()):
            found.append(f"{start}{engine}: not run{empty}")
            continue
        try:
            folder = made(model, recipe, changes, to, args)
            manifest = exports.open_export(folder)
            if engine in manifest["engines"]:
                found.append(start + row(model, to, engine, folder, python))
            else:
                why = "it ignores online transforms" if engine == "transformers" else "on a CPU it has no place for it"
                found.append(f"{start}{engine}: refused, {why}{empty}")
            weight = exports.weight_of(folder, manifest)
            sizes.append(f"| {model.name} | {label} | {to} | {weight.bytes:,} | {weight.bf16_bytes:,} |")
        except LatmixError as error:
            found.append(f"{start}{engine}: {str(error).splitlines()[0]}{empty}")
        print(found[-1], flush=True)
    return found, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--engines", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs/engines"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines, sizes = [], []
    for model, cases in ((DEMO_MODEL, CASES), *((each, CASES[:1]) for each in args.models)):
        for recipe, changes in cases:
            found, bytes_ = rows(model, recipe, changes, args)
            lines, sizes = lines + found, sizes + bytes_
    command = shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]])
    text = f"""# One model, four engines

Each recipe made for its target (seed {args.seed}), exported, loaded by the engine, asked for the same
{fingerprint.WINDOWS} windows of at most {fingerprint.WINDOW} tokens of text that no run saw. "W4A4" and "W4A16" are
the run's own perplexity with and without rounded activations (with MXFP8, W8A8 and W8A16), "KL" is to full precision,
"KL to run" to the run's own answers, in nats per token. All in float32. vLLM's arithmetic for these formats is that of
the plugin in `tests/engines`, for its CPU platform has none. llama.cpp rounds activations to 8 bits, so it has to lie
between the two. transformers ignores online transforms and is refused such folders.
{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}. Regenerate:

    {command}

| model | recipe | export | engine | perplexity | run W4A4 | run W4A16 | KL | KL to run | same greedy tokens | agrees |
|---|---|---|---|---|---|---|---|---|---|---|
"""
    head = "\n\n| model | recipe | export | bytes of tensors | in bfloat16 |\n|---|---|---|---|---|\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n".join(lines) + head + "\n".join(dict.fromkeys(sizes)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
