"""What a learning step costs against a plain distillation step of the same model, in one process.

    python benchmarks/learning_step.py [--model DIR] [--recipe latmix-lu]

Plain: the teacher's forward, the forward and backward of a float copy of the model with all its weights learning. Ours:
the same with maps, quantizers and frozen weights. The two alternate, so that noise disturbs both; ratios are of the
fastest rounds, and the spread of all rounds is printed beside them. The teacher's forward is timed by itself and added
to both: latmix asks the teacher once for all epochs, and so could anybody; without it in either step the ratio is
larger, and printed too.
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
from latmix.distill import Answers, Mapped, Teacher, accumulate, divergence
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

    answers, rows = Answers(Teacher(lambda: teacher, teacher.lm_head, ""), ids), torch.arange(len(ids))

    def teacher_step() -> None:
        with torch.no_grad():
            teacher(ids, use_cache=False)

    def plain_step() -> None:
        divergence(answers.logits(rows), plain(ids, use_cache=False).logits).mean().backward()
        plain.zero_grad()

    def our_step() -> None:
        accumulate(student, answers, ids, rows, learning)
        maps.zero_grad()

    plain_step(), our_step()
    rounds = [(seconds(teacher_step), seconds(plain_step), seconds(our_step)) for _ in range(args.rounds)]
    asked, base, ours = map(min, zip(*rounds, strict=True))
    print(f"plain {1000 * (asked + base):.0f} ms, {args.recipe} {(asked + ours) / (asked + base):.2f} times that")
    print(f"without the teacher's forward: plain {1000 * base:.0f} ms, {args.recipe} {ours / base:.2f} times that")
    ratios = sorted((t + o) / (t + b) for t, b, o in rounds)
    print(f"all rounds, with it: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
