"""Quantized models in latmix, transformers, vLLM and llama.cpp: the same tokens, perplexity and KL of each.

    scripts/engines.sh ENGINES
    python benchmarks/engines.py --engines ENGINES --out docs/results/engines.md

Every preset is made for every target: as it is where the target can serve that, otherwise without what the target has
no place for (a column says what was changed), and what a target refuses is a row that says why. The model is the one
that ships with latmix; `--models` adds folders. Texts, windows and tokens are those of the export's fingerprint.
Without `--engines` only transformers runs. What is finished (a run, an export, an answer) is not made again (`--runs`
keeps it).
"""

import argparse
import dataclasses
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
from latmix import targets
from latmix.assets import DEMO_MODEL
from latmix.errors import LatmixError
from latmix.export import fingerprint
from latmix.export.verify import ask, judge, record
from latmix.model.layout import layout_of
from latmix.model.load import load
from latmix.model.source import open_source
from latmix.recipe import Recipe, override
from latmix.recipes import RECIPES, find

PLACES = (("compressed-tensors", "vllm"), ("compressed-tensors", "transformers"), ("transformers", "transformers"))
PLACES += (("gguf", "llama"),)
CASES: list[tuple[str, dict[str, str]]] = [(recipe, {}) for recipe in RECIPES]
CASES += [
    ("gptq", {"activations": "none"}),
    ("latmix-plus", {"activations": "none"}),
    ("gptq", {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3:scale=rceil"}),
    ("gptq", {"weights": "mxint4", "activations": "mxint4"}),
    ("gptq", {"weights": "nvfp4", "activations": "nvfp4"}),
    ("gptq", {"weights": "nvfp4", "activations": "none"}),
]
ADDED = [("gptq", {}), ("latmix-plus", {})]  # of the models that are added


def fitted(model: Path, wished: Recipe, to: str) -> Recipe:
    """The recipe as `--set target=…` changes it. Raises: LatmixError: the target refuses."""
    source = open_source(model)
    return targets.fit(dataclasses.replace(wished, target=to), layout_of(source.skeleton(), source.arch, wished))


def changed(wished: Recipe, recipe: Recipe) -> str:
    """What the target left out, as settings."""
    found = []
    before, after = dataclasses.asdict(wished), dataclasses.asdict(recipe)
    for key in ("folded", "online", "tuning"):
        old, new = before[key] or {}, after[key] or {}
        found += [f"{key}.{name}={spelled(new.get(name))}" for name, value in old.items() if new.get(name) != value]
    found += ["layerwise=none"] if wished.layerwise and not recipe.layerwise else []
    return " ".join(found) or "nothing"


def spelled(value: object) -> str:
    """As `--set` reads it."""
    return "none" if value is None else ",".join(value) if isinstance(value, tuple) else str(value)


def made(model: Path, recipe: Recipe, to: str, args: argparse.Namespace) -> Path:
    """The exported folder. A run is shared by the targets that change a recipe alike."""
    plain = dataclasses.replace(recipe, target=None, seed=args.seed)
    name = f"{model.name}-{recipe.name}-{plain.digest}"
    run, out = args.runs / name, args.runs / f"{name}-{to}"
    if not run.exists():
        latmix.quantize(model, run, plain)
    return out if out.exists() else exports.export(run, to, out)


@functools.cache
def full_precision(model: Path, folder: Path) -> torch.Tensor:
    """Log-probabilities of the unquantized model on the windows of a fingerprint, which all its exports share."""
    original = load(model).model
    with torch.no_grad():
        each = [original(row[None]).logits[0, :-1].double() for row in fingerprint.read(folder).tensors["windows"]]
    return torch.stack(each).log_softmax(-1)


def row(model: Path, engine: str, folder: Path, python: str | None) -> str:
    """What the engine answered, in columns, asked once. Raises: LatmixError: the engine cannot run it."""
    known = folder.with_name(f"{folder.name}-{engine}.row")
    if not known.exists():
        known.write_text(answered(model, engine, folder, python), "utf-8")
    return known.read_text("utf-8")


def answered(model: Path, engine: str, folder: Path, python: str | None) -> str:
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
    wished = shortened(override(find(recipe), changes), args.set)
    for to, engine in PLACES:
        start, empty = f"| {model.name} | {label} | {to} | ", " | | | | | | |"
        python = None if engine == "transformers" else args.engines and str(args.engines / engine / "bin/python")
        if engine != "transformers" and not (python and Path(python).exists()):
            found.append(f"{start}| {engine}: not run{empty}")
            continue
        change = ""
        try:
            change = changed(wished, made_for := fitted(model, wished, to))
            folder = made(model, made_for, to, args)
            manifest = exports.open_export(folder)
            if engine in manifest["engines"]:
                found.append(f"{start}{change} | " + row(model, engine, folder, python))
            else:
                why = "it ignores online transforms" if engine == "transformers" else "on a CPU it has no place for it"
                found.append(f"{start}{change} | {engine}: refused, {why}{empty}")
            weight = exports.weight_of(folder, manifest)
            sizes.append(f"| {model.name} | {label} | {to} | {weight.bytes:,} | {weight.bf16_bytes:,} |")
        except LatmixError as error:
            found.append(f"{start}{change} | {engine}: refused. {str(error).splitlines()[0]}{empty}")
        print(found[-1], flush=True)
    return found, sizes


def shortened(recipe: Recipe, words: list[str]) -> Recipe:
    """With these settings, but for those of a stage that the recipe does not have."""
    pairs = dict(pair.split("=", 1) for pair in words)
    return override(recipe, {key: value for key, value in pairs.items() if getattr(recipe, key.partition(".")[0])})


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
    for model, cases in ((DEMO_MODEL, CASES), *((each, ADDED) for each in args.models)):
        for recipe, changes in cases:
            found, bytes_ = rows(model, recipe, changes, args)
            lines, sizes = lines + found, sizes + bytes_
    names = ["model", "recipe", "export", "changed for it", "engine", "perplexity", "run W4A4", "run W4A16", "KL"]
    names += ["KL to run", "same greedy tokens", "agrees"]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    command = shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]])
    text = f"""# One model, four engines

Every recipe made for every target (seed {args.seed}; "changed for it" is what the target left out, without which it
refuses the run), exported, loaded by the engine, asked for the same {fingerprint.WINDOWS} windows of at most
{fingerprint.WINDOW} tokens of text that no run saw. This page compares engines, not recipes: learning is as short as
the command says (`latmix-plus` at its defaults is in the [guide](../guide/serving.md)). "W4A4" and "W4A16" are
the run's own perplexity with and without rounded activations (with MXFP8, W8A8 and W8A16), "KL" is to full precision,
"KL to run" to the run's own answers, in nats per token. All in float32. vLLM's arithmetic for these formats is that of
the plugin in `tests/engines`, for its CPU platform has none. llama.cpp rounds activations to 8 bits, so it has to lie
between the two. transformers ignores online transforms and is refused such folders.
{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}. Regenerate:

    {command}

{head}
"""
    below = "\n\n| model | recipe | export | bytes of tensors | in bfloat16 |\n|---|---|---|---|---|\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + "\n".join(lines) + below + "\n".join(dict.fromkeys(sizes)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
