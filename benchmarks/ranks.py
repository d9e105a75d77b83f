"""What a second process brings: seconds of each stage of a run, by one process and by two, of one thread each.

    python benchmarks/ranks.py [--recipes gptq …] [--out FILE]

The model has random weights, two layers of width 1024; whatever is measured of it is of no interest. Each run is a
`torchrun` of its own. The processes share one machine: on two cores, two is the most to be had.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from latmix.assets import DEMO_MODEL
from latmix.model.load import load_tokenizer

WINDOWS = {"calibration.windows": "64", "calibration.window": "256", "calibration.held_out": "8"}
FEW = {
    "calibration.windows": "16",
    "calibration.generated": "16",
    "calibration.window": "256",
    "calibration.held_out": "8",
}
STEPS = {"steps": "4", "batch": "8", "evaluate_every": "4"}
RECIPES = {
    "gptq": WINDOWS,
    "latmix-qr": FEW | {f"learning.{key}": value for key, value in STEPS.items()},
    "latmix-plus": FEW | {f"{stage}.{key}": value for stage in ("learning", "tuning") for key, value in STEPS.items()},
}
STAGES = ("learn", "quantize", "fold", "measure", "tune")


def make(path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer(DEMO_MODEL).save_pretrained(path)
    return path


def run(model: Path, out: Path, recipe: str, processes: int) -> dict[str, float]:
    """Seconds of each stage, on the first process's clock."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", "latmix", "quantize", str(model), "--out", str(out), "--recipe", recipe]
    words += [f"--set={key}={value}" for key, value in RECIPES[recipe].items()]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    stages = json.loads((out / "summary.json").read_text())["stages"]
    return {name: stage["seconds"] for name, stage in stages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--out", type=Path)
    wish = parser.parse_args()
    lines = ["| recipe | stage | one process, s | two, s | one / two |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        model = make(Path(folder, "model"))
        for recipe in wish.recipes:
            one, two = (run(model, Path(folder, f"{recipe}-{count}"), recipe, count) for count in (1, 2))
            for stage in STAGES:
                if one.get(stage, 0.0) > 0.5:
                    figures = f"{one[stage]:.1f} | {two[stage]:.1f} | {one[stage] / two[stage]:.2f}"
                    lines.append(f"| {recipe} | {stage} | {figures} |")
    print("\n".join(lines))
    if wish.out is not None:
        wish.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
