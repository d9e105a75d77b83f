"""`latmix plan` against what happened: predicted and measured peak memory, size and time, on models of several sizes.

    python benchmarks/plan.py --out docs/results/plan.md

Models have random weights, hidden sizes 128 (the one that ships with latmix) to 1024; every run and every plan is a
process of its own. Windows and steps are few: they do not decide what is held at once, except where the plan says so.
A finished run is not made again (`--runs` keeps them).
On `FITTED` the constants of `latmix.analysis.work` were chosen, on `OTHERS` (two more shapes, more recipes) not.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from latmix.assets import DEMO_MODEL
from latmix.eval import size_of
from latmix.model.load import load_tokenizer
from latmix.recipe import override
from latmix.recipes import find

SHAPES = {  # family, hidden, intermediate, layers, vocabulary
    "24M": ("llama", 512, 2048, 4, 8192),
    "144M": ("llama", 1024, 4096, 5, 32000),
    "48M": ("qwen3", 768, 2304, 5, 16384),
    "90M": ("qwen2", 640, 1920, 5, 49152),
}
SMALL = {"calibration.windows": "8", "calibration.held_out": "4", "calibration.window": "256"}
LEARN = {"calibration.generated": "8", "learning.steps": "1", "learning.batch": "4"}
LAYERS = {"layerwise.epochs": "1"}
TUNE = {
    "tuning.steps": "3",
    "tuning.batch": "4",
    "tuning.evaluate_every": "1",
}  # Adam's moments are there from the second
FITTED: list[tuple[str, str, dict[str, str]]] = [
    ("demo", "gptq", {"calibration.windows": "64"}),
    ("24M", "gptq", SMALL),
    ("144M", "gptq", SMALL),
    ("demo", "latmix-lu", {"calibration.windows": "64", "learning.steps": "2"}),
    ("24M", "latmix-lu", SMALL | LEARN),
    ("144M", "latmix-lu", {**SMALL, **LEARN, "calibration.window": "128"}),
    (
        "demo",
        "latmix-plus",
        {"calibration.windows": "64", "calibration.generated": "64", "learning.steps": "2", "tuning.steps": "2"},
    ),
    ("24M", "latmix-plus", SMALL | LEARN | TUNE),
    ("90M", "latmix-plus", SMALL | LEARN | TUNE),
    ("24M", "wush", SMALL),
    ("48M", "flatquant", SMALL | LAYERS),
    ("90M", "spinquant", SMALL | LEARN),
]
OTHERS: list[tuple[str, str, dict[str, str]]] = [
    ("24M", "rtn", SMALL),
    ("48M", "quarot", SMALL),
    ("90M", "mr-gptq", SMALL),
    ("48M", "wush", SMALL),
    ("24M", "flatquant", SMALL | LAYERS),
    ("48M", "brq", SMALL | LEARN),
    ("48M", "latmix-qr", SMALL | LEARN),
]
PLAN = """
import json, sys
from latmix.analysis.plan import plan
found = plan(sys.argv[1], sys.argv[2], ("mxfp4:scale=even",))
print(json.dumps({"peak": max(found.work.peak.values()), "stage": max(found.work.peak, key=found.work.peak.get),
                  "seconds": sum(found.work.seconds.values()),
                  "disk": found.checkpoints[1].disk}))
"""


def make(folder: Path, name: str) -> Path:
    """A checkpoint of that shape."""
    if name == "demo":
        return DEMO_MODEL
    path = folder / name
    if not path.exists():
        family, hidden, intermediate, layers, vocabulary = SHAPES[name]
        config = transformers.AutoConfig.for_model(
            family, vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path, max_shard_size="100MB")
        load_tokenizer(DEMO_MODEL).save_pretrained(path)
    return path


def measure(folder: Path, name: str, recipe: str, settings: dict[str, str]) -> list[str]:
    """One row."""
    model, run = make(folder, name), folder / f"{name}-{recipe}"
    file, clock = run.with_suffix(".json"), run.with_suffix(".seconds")
    file.write_text(override(find(recipe), settings).to_json())
    if not clock.exists():
        words = [sys.executable, "-m", "latmix", "quantize", str(model), "--recipe", str(file), "--out", str(run)]
        began = processor_seconds()
        subprocess.run(words, check=True, capture_output=True)
        clock.write_text(str((processor_seconds() - began) / torch.get_num_threads()))
    seconds = float(clock.read_text())
    plan = [sys.executable, "-c", PLAN, str(model), str(file)]
    predicted = json.loads(subprocess.run(plan, check=True, capture_output=True, text=True).stdout)
    stages = json.loads((run / "summary.json").read_text())["stages"]
    at, peak = max(((stage, cost["peak_bytes"]) for stage, cost in stages.items()), key=lambda pair: pair[1])
    disk = size_of(run, 1).bytes
    cells = [name, recipe, f"{predicted['peak'] / 2**20:.0f} ({predicted['stage']})", f"{peak / 2**20:.0f} ({at})"]
    cells += [f"{predicted['peak'] / peak - 1:+.0%}", f"{predicted['disk']:,}", f"{disk:,}"]
    cells += [f"{predicted['disk'] / disk - 1:+.2%}", f"{predicted['seconds']:.0f}", f"{seconds:.0f}"]
    return [*cells, f"{predicted['seconds'] / seconds:.2f}"]


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended: what other work on the machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("benchmark-runs/plan"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    names = ["model", "recipe", "peak, MiB", "measured", "", "on disk", "measured", "", "seconds", "measured", "ratio"]
    tables = []
    for runs in (OTHERS, FITTED):
        tables.append([f"| {' | '.join(names)} |", "|" + "---|" * len(names)])
        for name, recipe, settings in runs:
            tables[-1].append("| " + " | ".join(measure(args.runs, name, recipe, settings)) + " |")
            print(tables[-1][-1], flush=True)
    if args.out:
        about = f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
        others, fitted = ("\n".join(table) for table in tables)
        args.out.write_text(HEAD.format(about=about, torch=torch.__version__, fitted=fitted, others=others), "utf-8")


HEAD = """# Plans against what happened

Peak host memory (the largest of all stages, which the bracket names), bytes on disk and seconds, as `latmix plan`
predicts them from `config.json` and as runs measured them. A plan and a run are processes of their own. Models of
random weights; few windows and steps. Seconds are processor time over threads, so that other processes on the machine
do not count, Python's start included (predicted as six seconds).
{about}, torch {torch}. Regenerate:

    python benchmarks/plan.py --out docs/results/plan.md

Models and recipes that the constants of the model of memory were chosen on:

{fitted}

Models and recipes that they were not (the two constants of the model of time were chosen on the first three of these
rows and on the last three above):

{others}
"""

if __name__ == "__main__":
    main()
