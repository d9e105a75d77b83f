"""Our baselines beside other tools' own code, on the model that ships with latmix: same calibration windows, same
format, same evaluation.

    pip install -e . llmcompressor==0.14.0.1 auto-round==0.15.1 amd-quark==0.13 \\
        'brevitas[llm]==0.13.4' msmodelslim==26.1.0                    (in an environment of its own)
    python benchmarks/peers.py --out docs/results/peers.md

Every row is a process of its own, its scores kept in comparisons/peers: run it again after an interruption. A peer's
model is measured in its own process, as that tool computes it (weights rounded, inputs rounded on the fly), by latmix's
perplexity and KL on the evaluation text of the package. Peers keep embedding and head in float32, latmix in bfloat16.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from peer_pairs import PAIRS

import latmix
from latmix.assets import CALIBRATION, DEMO_MODEL, EVALUATION
from latmix.data import calibration_windows, read_text, windows
from latmix.eval import score
from latmix.model.attach import attach
from latmix.model.load import load
from latmix.model.maps import build_maps
from latmix.numerics import parse_format
from latmix.recipe import Recipe, override

KEPT = Path("comparisons/peers")
TOOLS = ("torch", "llmcompressor", "auto-round", "amd-quark", "brevitas", "msmodelslim")
IN_PLACE = "in place"


def gains_in_place(recipe: Recipe) -> Any:
    """Weights and inputs rounded to nearest with the gains left in the norms, where no run of latmix leaves them."""
    loaded = load(DEMO_MODEL)
    assert recipe.activations is not None
    activations, weights = parse_format(recipe.activations), parse_format(recipe.weights)
    none = build_maps(loaded.arch, loaded.model.config, {}, {}, block=weights.block, seed=0)
    return attach(loaded.model, loaded.arch, none, activations, weights).model


def place(name: str, side: str) -> Path:
    """Where a row's scores are kept, without suffix; a recipe that stands beside several tools has one place."""
    stem = {"peer": name, IN_PLACE: f"{name}-in-place"}.get(side, f"ours-{side}")
    return KEPT / stem.replace(",", "").replace(" ", "-")


def measure(name: str, side: str, few: int | None) -> dict[str, float]:
    """One row. `few`: windows to calibrate and to measure on; None: all."""
    pair, original = PAIRS[name], load(DEMO_MODEL)
    recipe = next((each for each in pair.ours if each.name == side), pair.ours[0])
    recipe = recipe if few is None else override(recipe, {"calibration.windows": str(few)})
    takes = original.longest, original.vocabulary
    taught, _ = calibration_windows(read_text(CALIBRATION), original.tokenizer, recipe.calibration, *takes)
    seen = windows(read_text(EVALUATION), original.tokenizer, *takes)[:few]
    began = time.perf_counter()
    if side == "peer":
        model = pair.run(load(DEMO_MODEL), taught).eval()
    elif side == IN_PLACE:
        model = gains_in_place(recipe).eval()
    else:
        latmix.quantize(DEMO_MODEL, place(name, side), recipe)
        model = latmix.pipeline.restore(place(name, side)).model
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


def table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    lines = ["| what | KL | perplexity | s | ours | KL | perplexity | s | ours / theirs |", "|" + "---|" * 9]
    for (name, side), ours in rows.items():
        if side != "peer":
            pair, theirs = PAIRS[name], rows.get((name, "peer"), {})
            title = "the same, gains left in the norms" if side == IN_PLACE else side
            ratio = f"{ours['kl'] / theirs['kl']:.{6 if side == IN_PLACE else 2}f}" if theirs and ours else ""
            lines.append(f"| {pair.peer} | {_cells(theirs)} | {title} | {_cells(ours)} | {ratio} |")
    return "\n".join(lines)


def _cells(row: dict[str, float]) -> str:
    return f"{row['kl']:.4f} | {row['perplexity']:.3f} | {row['s']:.0f}" if row else "failed | | "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=PAIRS, nargs="*", default=list(PAIRS))
    parser.add_argument("--few", type=int, help="windows to calibrate and measure on: to see whether it runs; not kept")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    if args.one:
        print("\n" + json.dumps(measure(*args.one, args.few)))
        return
    rows = {(name, side): row(name, side, args.few) for name in args.only for side in PAIRS[name].sides}
    if args.out:
        versions = ", ".join(f"{tool} {importlib.metadata.version(tool)}" for tool in TOOLS)
        args.out.write_text(f"{HEAD}\n{table(rows)}\n\nMeasured {datetime.date.today()}, {versions}.\n")


def row(name: str, side: str, few: int | None) -> dict[str, float]:
    """A row's scores, kept or measured; empty where that fails."""
    kept = place(name, side).with_suffix(".json")
    if few or not kept.is_file():
        words = [sys.executable, __file__, "--one", name, side, *(["--few", str(few)] if few else [])]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}, {side}: failed", flush=True)
            return {}
        found = json.loads(done.stdout.splitlines()[-1])
        print(name, side, found, flush=True)
        if few:
            return found
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


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

**AutoRound with 200 iterations is ahead of GPTQ at equal terms** (same format, nothing online): it learns the rounding,
layer by layer. No baseline here does. The row below it is what learned rounding gives here, end to end on KL, from the
same start, with no rotation and nothing else that learns: `latmix-plus` without the rest.

**Learned rotations.** Brevitas and Quark learn with SpinQuant's optimizer (SGD on the Stiefel manifold by Cayley
transforms), rate (1.5), 100 steps of 8 windows and cosine. Brevitas has the weights rounded while it learns, and keeps
for GPTQ the scales that they had before. Quark's package has the parts and no command: `benchmarks/peer_quark.py` puts
them together, with inputs rounded and weights not. Its R4 would be learned, too, so it is left out on both sides. With
scales after the norms on KL over the top 1000 it does what OSTQuant does there (rate of scales, .001 or .01, by KL on
the held-out calibration windows). Its scales of the values are not exact where heads share keys and values (here two
queries to a key), and its scales at up alone end in an error; both are left out on both sides.

**FlatQuant** is that of msModelSlim, by the company whose researchers wrote the method, with MXFP4 in place of its
integers, and the authors' rate and epochs; weights to nearest on both sides, as the authors round them.

The other rows differ in order, damping and scales of GPTQ, in random signs, and in the gains. QuIP in blocks has no
search for scales, which `mr-gptq` has as published; the row below it is without.

Not compared: SpinQuant, OSTQuant, FlatQuant, MR-GPTQ (FP-Quant), BRQ and WUSH as their authors wrote them, in
repositories that no package index has. Nor, since there is nothing to compare: llm-compressor's `learnable=True`
only makes matrices parameters; AutoRound's training of rotations holds no quantizer, and its documentation calls it not
validated (its loss was 4.6 nats from the first of four steps); AIMET's SpinQuant learns nothing; the package `fp-quant`
has layers for GPUs and no calibration; NVIDIA's Model Optimizer 0.47 has no rotation of weights. OneComp 1.4.0 trains
rotations and scales for integers; it wants Python 3.12 and was not tried. Of BRQ and WUSH no other implementation was
found.
"""

if __name__ == "__main__":
    main()
