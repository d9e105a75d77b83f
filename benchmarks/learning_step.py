"""What a learning step costs against a plain distillation step of the same model, in one process.

    python benchmarks/learning_step.py [--model DIR] [--recipe latmix-lu]

Plain: the teacher's forward, the forward and backward of a float copy of the model with all its weights learning. Ours:
the same with maps, quantizers and frozen weights. The two alternate, so that noise disturbs both; the ratio is
of the fastest rounds, and the spread of all ratios is printed beside it.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from latmix.assets import DEMO_MODEL
from latmix.distill import Mapped, accumulate, divergence
from latmix.model.attach import attach
from latmix.model.checkpoint import share
from latmix.model.fold import absorb_gains
from latmix.model.load import load
from latmix.model.maps import build_maps
from latmix.numerics import parse_format
from latmix.recipes import find


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--recipe", default="latmix-lu")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()

    recipe, loaded = find(args.recipe), load(args.model)
    assert recipe.learning is not None, f"{args.recipe} learns nothing"
    learning = recipe.learning
    teacher, arch = loaded.model, loaded.arch
    absorb_gains(teacher, arch)
    plain = copy.deepcopy(teacher).requires_grad_(True)
    activations, weights = parse_format(recipe.activations), parse_format(recipe.weights)
    places = (arch, teacher.config, recipe.folded, recipe.online)
    maps = build_maps(*places, block=activations.block, seed=0).to(teacher.device)
    attached = attach(share(teacher), arch, maps, activations, weights if learning.weights else None)
    student = Mapped(attached, learning.volume)
    ids = torch.randint(teacher.config.vocab_size, (learning.batch, min(256, loaded.longest)), device=teacher.device)

    def plain_step() -> None:
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits
        divergence(target, plain(ids, use_cache=False).logits).mean().backward()
        plain.zero_grad()

    def our_step() -> None:
        accumulate(student, teacher, ids, learning)
        maps.zero_grad()

    plain_step(), our_step()
    rounds = [(seconds(plain_step), seconds(our_step)) for _ in range(args.rounds)]
    ratio = min(ours for _, ours in rounds) / min(base for base, _ in rounds)
    ratios = sorted(ours / base for base, ours in rounds)
    print(f"plain {1000 * min(base for base, _ in rounds):.0f} ms, {args.recipe} {ratio:.2f} times that")
    print(f"all rounds: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
