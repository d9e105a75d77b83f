"""Quantized models in latmix, transformers, vLLM and llama.cpp: the same tokens, perplexity and KL of each.

    scripts/engines.sh ENGINES
    python benchmarks/engines.py --engines ENGINES --out docs/results/engines.md

Every preset is made for every target: as it is where the target can serve that, otherwise without what the target has
no place for (a column says what was changed), and what a target refuses is a row that says why. There is no third
case: an engine that fails ends the command, and so does, at the end, an answer out of the bounds (`Row.holds`). The
model is the one that ships with latmix; `--models` adds folders. Texts, windows and tokens are those of the export's
fingerprint. What is finished (a run, an export, an answer) is not made again (`--runs` keeps it).
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import engines_page
import torch
from engines_page import PLACES, Row

import latmix
from latmix import export as exports
from latmix import targets
from latmix.assets import DEMO_MODEL
from latmix.errors import InputError
from latmix.export import fingerprint
from latmix.export.verify import ask, judge, record
from latmix.model.layout import layout_of
from latmix.model.load import load
from latmix.model.source import open_source
from latmix.pipeline import restore
from latmix.recipe import Recipe, override
from latmix.recipes import RECIPES, find
from latmix.rundir import read_json, write_json

CASES: list[tuple[str, dict[str, str]]] = [(recipe, {}) for recipe in RECIPES]
CASES += [  # what all targets serve
    ("block-hadamard", {"online.down": "none"}),
    ("latmix-lu", {"folded.residual": "lu:shift=layers", "online.down": "none"}),
    ("latmix-plus", {"folded.residual": "qr:shift=layers", "online.down": "none"}),
]
CASES += [
    ("gptq", {"activations": "none"}),
    ("latmix-plus", {"activations": "none"}),
    ("gptq", {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3:scale=rceil"}),
    ("gptq", {"weights": "mxint4", "activations": "mxint4"}),
    ("gptq", {"weights": "nvfp4", "activations": "nvfp4"}),
    ("gptq", {"weights": "nvfp4", "activations": "nvfp4:tensor_scale=1"}),
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


def made(model: Path, recipe: Recipe, to: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """The run, which is shared by the targets that change a recipe alike, and the exported folder."""
    plain = dataclasses.replace(recipe, target=None, seed=args.seed)
    name = f"{model.name}-{recipe.name}-{plain.digest}"
    run, out = args.runs / name, args.runs / f"{name}-{to}"
    if not run.exists():
        latmix.quantize(model, run, plain)
    return run, out if out.exists() else exports.export(run, to, out)


@functools.cache
def full_precision(model: Path, folder: Path) -> torch.Tensor:
    """Log-probabilities of the unquantized model on the windows of a fingerprint, which all its exports share."""
    return computed(load(model).model, folder)


def computed(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        each = [model(row[None]).logits[0, :-1].double() for row in fingerprint.read(folder).tensors["windows"]]
    return torch.stack(each).log_softmax(-1)


def to_original(model: Path, folder: Path, logprobs: torch.Tensor) -> float:
    """KL of these answers to full precision, nats a token."""
    p = full_precision(model, folder)
    return float((p.exp() * (p - logprobs.double()[..., : p.shape[-1]])).sum(-1).mean())


def answered(model: Path, engine: str, folder: Path, python: str | None) -> dict[str, Any]:
    """The verdict on the engine, asked once, and its KL to full precision. Raises: LatmixError: it cannot run it."""
    known = folder.with_name(f"{folder.name}-{engine}.json")
    if not known.exists():
        kept = fingerprint.read(folder)
        answer = ask(folder, engine, kept.request, python)
        verdict = judge(kept, answer, engine)
        record(folder, engine, verdict)
        original = to_original(model, folder, torch.from_numpy(answer["logprobs"]))
        write_json(known, dataclasses.asdict(verdict) | {"original": original})
    found: dict[str, Any] = read_json(known)
    return found


def own(model: Path, run: Path, folder: Path) -> tuple[float, float]:
    """KL of the run to full precision, as it rounds activations and with them left alone; computed once."""
    known = run.with_name(f"{run.name}.json")
    if not known.exists():
        both = [to_original(model, folder, computed(restore(run, rounded).model, folder)) for rounded in (True, False)]
        write_json(known, both)
    rounded, alone = read_json(known)
    return rounded, alone


def rows(model: Path, recipe: str, changes: dict[str, str], args: argparse.Namespace) -> Iterator[Row]:
    label = " ".join([recipe, *(f"{key}={value}" for key, value in changes.items())])
    wished = override(find(recipe), shortened(find(recipe), args.set) | changes)
    for to, engine in PLACES:
        row = Row(model.name, label, to, engine)
        try:
            made_for = fitted(model, wished, to)
        except InputError as error:
            row.refused = str(error).splitlines()[0]
        else:
            row.change = changed(wished, made_for)
            serve(row, model, *made(model, made_for, to, args), args)
        print(row.line(), flush=True)
        yield row


def serve(row: Row, model: Path, run: Path, folder: Path, args: argparse.Namespace) -> None:
    """Fill in what the engine answered, or why it is not asked."""
    row.run, row.folder = run.name, folder
    python = None if row.engine == "transformers" else str(args.engines / row.engine / "bin/python")
    if row.engine in exports.open_export(folder)["engines"]:
        row.answer, row.own = answered(model, row.engine, folder, python), own(model, run, folder)
    else:
        ignores = "it ignores online transforms"
        row.refused = ignores if row.engine == "transformers" else "it takes NVFP4 on GPUs only"


def shortened(recipe: Recipe, words: list[str]) -> dict[str, str]:
    """These settings, but for those of a stage that the recipe does not have."""
    pairs = dict(pair.split("=", 1) for pair in words)
    return {key: value for key, value in pairs.items() if getattr(recipe, key.partition(".")[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[])
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases in whose recipe and settings this word is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs/engines"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    every = ((DEMO_MODEL, CASES), *((each, ADDED) for each in args.models))
    asked = [(model, *case) for model, cases in every for case in cases if args.only in f"{case}"]
    found = [row for model, recipe, changes in asked for row in rows(model, recipe, changes, args)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(engines_page.page(found, args.seed), "utf-8")
    if wrong := [row.line() for row in found if row.answer and not row.holds]:
        sys.exit("Out of bounds:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
