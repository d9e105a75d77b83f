"""`latmix plan` against what happened: predicted and measured peak memory and size, on models of several sizes.

    python benchmarks/plan.py --out docs/results/plan.md

Models have random weights, hidden sizes 128 (the one that ships with latmix) to 1024; every run and every plan is a
process of its own. Windows and steps are few: they do not decide what is held at once, except where the plan says so.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from latmix.assets import DEMO_MODEL
from latmix.eval import size_of
from latmix.model.load import load_tokenizer
from latmix.recipe import override
from latmix.recipes import find

SHAPES = {"24M": (512, 2048, 4, 8192), "144M": (1024, 4096, 5, 32000)}  # hidden, intermediate, layers, vocabulary
SMALL = {"calibration.windows": "8", "calibration.held_out": "4", "calibration.window": "256"}
RUNS = [
    ("demo", "gptq", {"calibration.windows": "64"}),
    ("24M", "gptq", SMALL),
    ("144M", "gptq", SMALL),
    ("demo", "latmix-lu", {"calibration.windows": "64", "learning.steps": "2"}),
    ("24M", "latmix-lu", {**SMALL, "learning.steps": "1", "learning.batch": "4"}),
    ("demo", "latmix-plus", {"calibration.windows": "64", "tuning.steps": "2"}),
    ("24M", "latmix-plus", {**SMALL, "tuning.steps": "1", "tuning.batch": "4"}),
    ("144M", "latmix-lu", {**SMALL, "calibration.window": "128", "learning.steps": "1", "learning.batch": "4"}),
]
PLAN = """
import json, sys
from latmix.analysis.plan import plan
found = plan(sys.argv[1], sys.argv[2], ("mxfp4:scale=even",))
print(json.dumps({"peak": max(found.work.peak.values()), "stage": max(found.work.peak, key=found.work.peak.get),
                  "disk": found.checkpoints[1].disk}))
"""


def make(folder: Path, name: str) -> Path:
    """A checkpoint of that shape."""
    if name == "demo":
        return DEMO_MODEL
    path = folder / name
    if not path.exists():
        hidden, intermediate, layers, vocabulary = SHAPES[name]
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(path, max_shard_size="100MB")
        load_tokenizer(DEMO_MODEL).save_pretrained(path)
    return path


def measure(folder: Path, name: str, recipe: str, settings: dict[str, str]) -> list[str]:
    """One row."""
    model, run = make(folder, name), folder / f"{name}-{recipe}"
    file = folder / f"{recipe}.json"
    file.write_text(override(find(recipe), settings).to_json())
    words = [sys.executable, "-m", "latmix", "quantize", str(model), "--recipe", str(file), "--out", str(run)]
    subprocess.run(words, check=True, capture_output=True)
    plan = [sys.executable, "-c", PLAN, str(model), str(file)]
    predicted = json.loads(subprocess.run(plan, check=True, capture_output=True, text=True).stdout)
    stages = json.loads((run / "summary.json").read_text())["stages"]
    at, peak = max(((stage, cost["peak_bytes"]) for stage, cost in stages.items()), key=lambda pair: pair[1])
    disk = size_of(run, 1).bytes
    cells = [name, recipe, f"{predicted['peak'] / 2**20:.0f} ({predicted['stage']})", f"{peak / 2**20:.0f} ({at})"]
    cells += [f"{predicted['peak'] / peak - 1:+.0%}", f"{predicted['disk']:,}", f"{disk:,}"]
    return [*cells, f"{predicted['disk'] / disk - 1:+.2%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = ["| model | recipe | peak, MiB | measured | | on disk | measured | |", "|" + "---|" * 8]
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe, settings in RUNS:
            lines.append("| " + " | ".join(measure(Path(folder), name, recipe, settings)) + " |")
            print(lines[-1], flush=True)
    if args.out:
        about = f"{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
        args.out.write_text(f"{HEAD}\n{about}, torch {torch.__version__}.\n\n" + "\n".join(lines) + "\n")


HEAD = """# Plans against what happened

Peak host memory (the largest of all stages, which the bracket names) and bytes on disk, as `latmix plan` predicts them
from `config.json` and as runs measured them. A plan and a run are processes of their own; 391 MiB of every peak is
Python and its packages. Models of random weights; few windows and steps. Regenerate:

    python benchmarks/plan.py --out docs/results/plan.md
"""

if __name__ == "__main__":
    main()
