"""The page that benchmarks/engines.py writes, and the bounds that its answers are held to."""

import datetime
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from latmix import export as exports
from latmix.export import fingerprint
from latmix.export.verify import BETWEEN, DIVERGED, SAME

GREEDY = 20
BITS = 0.005
"""Greedy tokens that have to be the run's; how far bits per weight may be from 4.25, relatively."""

PLACES = (("transformers", "transformers"), ("compressed-tensors", "transformers"), ("compressed-tensors", "vllm"))
PLACES += (("gguf", "llama"),)
"""Export and engine."""

NAMES = {"vllm": "vLLM", "llama": "llama.cpp", "transformers": "transformers"}


@dataclass
class Row:
    """One recipe in one engine.

    Attributes:
        change: what the target left out of the recipe.
        answer: the verdict and `original`, the engine's KL to full precision; None where it was refused.
        own: the run's KL to full precision, activations rounded and left alone.
    """

    model: str
    recipe: str
    to: str
    engine: str
    change: str = ""
    refused: str = ""
    run: str = ""
    folder: Path | None = None
    answer: dict[str, Any] | None = None
    own: tuple[float, float] = (0.0, 0.0)

    @property
    def holds(self) -> bool:
        """The verdict's bounds on perplexity and KL, the tokenizer; where arithmetic is shared, greedy tokens."""
        assert self.answer is not None
        return bool(self.answer["passed"] and (self.engine == "llama" or self.answer["greedy"] >= GREEDY))

    def line(self) -> str:
        start = f"| {self.model} | {self.recipe} | {self.to} | {self.change} | "
        if (found := self.answer) is None:
            return f"{start}{NAMES[self.engine]}: refused. {self.refused} | | | | | | | |"
        four = (found["perplexity"], found["run_perplexity"], found["run_weights_only"], found["original"])
        numbers = " | ".join(f"{number:.4f}" for number in four)
        last = f"{found['kl']:.1e} | {found['greedy']} of {found['of']} | {'yes' if self.holds else '**no**'} |"
        return f"{start}{found['engine']} | {numbers} | {last}"


def page(rows: list[Row], seed: int) -> str:
    command = shlex.join(["python", "benchmarks/engines.py", *sys.argv[1:]])
    about = f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}"
    names = ["model", "recipe", "export", "changed for it", "engine", "perplexity", "run W4A4", "run W4A16", "KL"]
    names += ["KL to run", "same greedy tokens", "within bounds"]
    return PAGE.format(
        seed=seed,
        windows=fingerprint.WINDOWS,
        window=fingerprint.WINDOW,
        about=about,
        command=command,
        same=f"{SAME:.1%}",
        kl=DIVERGED,
        between=f"{BETWEEN:.0%}",
        greedy=GREEDY,
        counts=counts(rows),
        together=together(rows),
        rows="\n".join([f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *(row.line() for row in rows)]),
        sizes=sizes(rows),
    )


def counts(rows: list[Row]) -> str:
    asked = [row for row in rows if row.answer]
    wrong = sum(not row.holds for row in asked)
    return f"{len(asked)} answers, {len(asked) - wrong} within the bounds; {len(rows) - len(asked)} refusals."


def together(rows: list[Row]) -> str:
    """What all engines served of one run: perplexity and KL to full precision."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row.answer:
            runs.setdefault(row.run, []).append(row)
    head, lines = ["recipe", "latmix, W4A4", "latmix, W4A16"], []
    for found in runs.values():
        # recipes that a target changes into this one asked for the same
        each = {(row.to, row.engine): row for row in reversed(found)}
        if len(each) < len(PLACES):
            continue
        four = [each[place] for place in PLACES]
        head = head[:3] + [f"{NAMES[row.engine]} ({row.to})" for row in four]
        answers = [row.answer for row in four if row.answer]
        own = zip((answers[0]["run_perplexity"], answers[0]["run_weights_only"]), four[0].own, strict=True)
        cells = [*own, *((answer["perplexity"], answer["original"]) for answer in answers)]
        lines.append(f"| {four[0].recipe} | {' | '.join(f'{a:.3f} / {b:.4f}' for a, b in cells)} |")
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def sizes(rows: list[Row]) -> str:
    names = ["model", "recipe", "export", "bits per weight of the linears", "bytes of tensors", "in bfloat16", "ratio"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        if row.folder is not None:
            manifest = exports.open_export(row.folder)
            weight, found = exports.weight_of(row.folder, manifest), bits(row.folder, manifest["weights"])
            if ("mxfp4" in manifest["recipe"]["weights"]) and abs(found / 4.25 - 1) > BITS:
                sys.exit(f"'{row.folder}' has {found} bits per weight.")
            cells = [f"{found:.3f}", f"{weight.bytes:,}", f"{weight.bf16_bytes:,}"]
            cells += [f"{weight.bytes / weight.bf16_bytes:.3f}"]
            lines.append(f"| {row.model} | {row.recipe} | {row.to} | {' | '.join(cells)} |")
    return "\n".join(dict.fromkeys(lines))


def bits(folder: Path, weights: int) -> float:
    """Of codes and scales, as they are on disk, per weight of the quantized linears."""
    if (file := folder / "model.gguf").exists():
        import gguf

        return sum(8 * t.n_bytes for t in gguf.GGUFReader(file).tensors if t.tensor_type.name == "MXFP4") / weights
    found = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            packed = [name for name in tensors.keys() if tensors.get_tensor(name).element_size() == 1]  # noqa: SIM118
            found += sum(8 * tensors.get_tensor(name).nbytes for name in packed)
    return found / weights


PAGE = """# One model, four engines

Every recipe made for every target (seed {seed}; "changed for it" is what the target left out, without which it
refuses the run), exported, loaded by the engine, asked for the same {windows} windows of at most
{window} tokens of text that no run saw. This page compares engines, not recipes: learning is as short as
the command says (`latmix-plus` at its defaults is in the [guide](../guide/serving.md)). "W4A4" and "W4A16" are
the run's own perplexity with and without rounded activations (with MXFP8, W8A8 and W8A16), "KL" is to full precision,
"KL to run" to the run's own answers, in nats per token. All in float32. vLLM's arithmetic for these formats is that of
the plugin in `tests/engines`, for its CPU platform has none. transformers ignores online transforms and is refused such
folders.

The bounds: vLLM and transformers within {same} of the run's W4A4 perplexity and {kl} nats a token of its answers, and
at least {greedy} greedy tokens as the run's; llama.cpp, which rounds activations to 8 bits, between the run's W4A16 and
W4A4 perplexity within {between}; everywhere the same ids of the same text. An answer outside ends the command with exit
code 1. {counts}

{about}. Regenerate:

    {command}

## The same run in every engine

Perplexity / KL to full precision.

{together}

## Every recipe × target

{rows}

## On disk

{sizes}
"""
