"""Our baselines beside other tools' own code, on the model that ships with latmix: same calibration windows, same
format, same evaluation.

    pip install -e . llmcompressor==0.14.0.1 auto-round==0.15.1 amd-quark==0.13    (in an environment of its own)
    python benchmarks/peers.py --out docs/results/peers.md

Every row is a process of its own, its scores kept in comparisons/peers: run it again after an interruption. A peer's
model is measured in its own process, as that tool computes it (weights rounded, inputs rounded on the fly), by latmix's
perplexity and KL on the evaluation text of the package. Peers keep embedding and head in float32, latmix in bfloat16.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from peer_tools import Peer, auto_round, compressor, quark

import latmix
from latmix.assets import CALIBRATION, DEMO_MODEL, EVALUATION
from latmix.data import calibration_windows, read_text, windows
from latmix.eval import score
from latmix.model.attach import attach
from latmix.model.load import load
from latmix.model.maps import build_maps
from latmix.numerics import parse_format
from latmix.recipe import Recipe, override
from latmix.recipes import find

KEPT = Path("comparisons/peers")
INPUTS = ("qkv", "o", "gate_up", "down")


def everywhere(transform: str) -> Recipe:
    """GPTQ under a fixed transform at every input, at run time."""
    return dataclasses.replace(find("gptq"), name=f"gptq, {transform} online", online=dict.fromkeys(INPUTS, transform))


def gains_in_place(recipe: Recipe) -> Any:
    """Weights and inputs rounded to nearest with the gains left in the norms, where no run of latmix leaves them."""
    loaded = load(DEMO_MODEL)
    assert recipe.activations is not None
    activations, weights = parse_format(recipe.activations), parse_format(recipe.weights)
    none = build_maps(loaded.arch, loaded.model.config, {}, {}, block=weights.block, seed=0)
    return attach(loaded.model, loaded.arch, none, activations, weights).model


@dataclasses.dataclass(frozen=True)
class Pair:
    """What another tool does, and what of ours is the same thing; `nearest`: rounding to nearest, which can be had with
    the gains in the norms, too."""

    peer: str
    run: Peer
    ours: Recipe
    nearest: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        return ("peer", "ours", "in place") if self.nearest else ("peer", "ours")


LC, AR, QUARK = "llm-compressor", "AutoRound", "Quark rotation R1 R2 R4"
FLOOR = {"weights": "mxfp4:scale=floor", "activations": "mxfp4:scale=floor"}
SEARCHED = FLOOR | {"weights": "mxfp4:scale=search"}
PAIRS = {
    "rtn": Pair(f"{LC} RTN", compressor(gptq=False), find("rtn"), nearest=True),
    "gptq": Pair(f"{LC} GPTQ", compressor(), find("gptq")),
    "r1r2": Pair(
        f"{LC} SpinQuant R1 R2 (Hadamard), GPTQ",
        compressor(spinquant={"rotations": ["R1", "R2"]}),
        override(find("quarot"), {"online.down": "none", "name": "quarot, nothing online"}),
    ),
    "r1r2r4": Pair(
        f"{LC} SpinQuant R1 R2 R4 (Hadamard), GPTQ",
        compressor(spinquant={"rotations": ["R1", "R2", "R4"]}),
        find("quarot"),
    ),
    "r1r2r4-32": Pair(
        f"{LC} SpinQuant R1 R2 R4 in blocks of 32, GPTQ",
        compressor(spinquant={"rotations": ["R1", "R2", "R4"], "transform_block_size": 32}),
        find("block-hadamard"),
    ),
    "quip": Pair(f"{LC} QuIP (random Hadamard), GPTQ", compressor(quip={"rotations": ["v"]}), everywhere("hadamard")),
    "quip-32": Pair(
        f"{LC} QuIP in blocks of 32, GPTQ",
        compressor(quip={"rotations": ["v"], "transform_type": "hadamard", "transform_block_size": 32}),
        find("mr-gptq"),
    ),
    "quark": Pair(f"{QUARK} (Hadamard), GPTQ", quark(None), find("quarot")),
    "quark-32": Pair(f"{QUARK} in blocks of 32, GPTQ", quark(32), find("block-hadamard")),
    "auto-0": Pair(
        f"{AR}, 0 iterations",
        auto_round(0),
        override(find("rtn"), SEARCHED | {"name": "rtn, weights search, inputs floor"}),
        nearest=True,
    ),
    "auto-200": Pair(
        f"{AR}, 200 iterations",
        auto_round(200),
        override(find("gptq"), FLOOR | {"name": "gptq, floor"}),
    ),
}


def measure(name: str, side: str, few: int | None) -> dict[str, float]:
    """One row. `few`: windows to calibrate and to measure on; None: all."""
    pair, original = PAIRS[name], load(DEMO_MODEL)
    recipe = pair.ours if few is None else override(pair.ours, {"calibration.windows": str(few)})
    takes = original.longest, original.vocabulary
    taught, _ = calibration_windows(read_text(CALIBRATION), original.tokenizer, recipe.calibration, *takes)
    seen = windows(read_text(EVALUATION), original.tokenizer, *takes)[:few]
    began = time.perf_counter()
    if side == "peer":
        model = pair.run(load(DEMO_MODEL), taught).eval()
    elif side == "in place":
        model = gains_in_place(recipe).eval()
    else:
        out = KEPT / f"{name}-run"
        latmix.quantize(DEMO_MODEL, out, recipe)
        model = latmix.pipeline.restore(out).model
    took = time.perf_counter() - began
    found = score(model, seen, original.model)
    assert found.kl is not None
    return {
        "perplexity": found.perplexity.mean,
        "kl": found.kl.mean,
        "low": found.kl.low,
        "high": found.kl.high,
        "s": took,
    }


def table(names: list[str], rows: dict[tuple[str, str], dict[str, float]]) -> str:
    lines = ["| what | KL | perplexity | s | ours | KL | perplexity | s | ours / theirs |", "|" + "---|" * 9]
    for name in names:
        pair, theirs = PAIRS[name], rows.get((name, "peer"))
        for side in pair.sides[1:]:
            ours = rows.get((name, side))
            title = pair.ours.name if side == "ours" else "the same, gains left in the norms"
            ratio = f"{ours['kl'] / theirs['kl']:.{2 if side == 'ours' else 6}f}" if theirs and ours else ""
            lines.append(f"| {pair.peer} | {_cells(theirs)} | {title} | {_cells(ours)} | {ratio} |")
    return "\n".join(lines)


def _cells(row: dict[str, float] | None) -> str:
    return f"{row['kl']:.4f} | {row['perplexity']:.3f} | {row['s']:.0f}" if row else "failed | | "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=PAIRS, nargs="*", default=list(PAIRS))
    parser.add_argument("--few", type=int, help="windows to calibrate and measure on: to see whether it runs")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if args.one:
        print("\n" + json.dumps(measure(*args.one, args.few)))
        return
    rows = {}
    for name in args.only:
        for side in PAIRS[name].sides:
            kept = KEPT / f"{name}-{side.replace(' ', '-')}.json"
            if not kept.is_file():
                words = [sys.executable, __file__, "--one", name, side, *(["--few", str(args.few)] if args.few else [])]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    print(f"{name}, {side}: failed")
                    continue
                kept.write_text(done.stdout.splitlines()[-1])
            rows[name, side] = json.loads(kept.read_text())
            print(name, side, rows[name, side], flush=True)
    if args.out:
        args.out.write_text(
            f"{HEAD}\nMeasured {datetime.date.today()}, torch {torch.__version__}.\n\n{table(args.only, rows)}\n"
        )


HEAD = """# Beside other tools

Each row is another tool's own code and the recipe of latmix that does the same, on the model that ships with latmix:
256 calibration windows of 256 tokens, MXFP4 weights and activations, KL to full precision and perplexity on the
evaluation text of the package; seconds on a busy machine, one seed. "ours / theirs" is the ratio of KL, below one where
ours is the better. Regenerate:

    python benchmarks/peers.py --out docs/results/peers.md

**Rounding to nearest is theirs exactly.** latmix moves every norm's gain into the linears that read it before anything
is quantized; llm-compressor does so only under SpinQuant, AutoRound never. With the gains left in the norms the same
formats give their figures (second row of each).

**Why AutoRound with 0 iterations is ahead of floor scales:** it gives each block of a weight the best of floor's scale,
its half and its double by squared error, without data, and floor scales to activations. That is `scale=search` here:
`--set weights=mxfp4:scale=search --set activations=mxfp4:scale=floor`. Not one weight of the eight linears compared
differed. `rtn` as it is takes EVEN scales on both sides, which makes more of a difference than that search does.

The other rows differ in order, damping and scales of GPTQ, in random signs, and in the gains. QuIP in blocks has no
search for scales; `mr-gptq` has.

**AutoRound with 200 iterations is ahead of GPTQ at equal terms** (same format, nothing online): it learns the rounding,
layer by layer. No baseline here does; `latmix-plus` learns codes end to end, with more besides, after a rotation.

Not compared: SpinQuant with learned rotations, OSTQuant, FlatQuant, MR-GPTQ (FP-Quant), BRQ and WUSH as their authors
wrote them, in repositories that no package index has. What stands for them above is what they share with others:
Hadamard rotations folded and online (SpinQuant before it learns), a block-Hadamard at every input (MR-GPTQ).
"""

if __name__ == "__main__":
    main()
