"""What the processes of `test_ranks.py` run, on tiny models: `torchrun … tests/ranks.py FOLDER MODEL [DEATH]`.

In FOLDER there are then, for learning with nothing rounded, learning as it is, tuning, and learning layer by layer, the
curve (of the last none) and what was learned, text that the model wrote beside answers of it, and three runs: GPTQ and
rounding to nearest without any activation, with bytes that do not depend on the number of processes, and one that is
tuned. What is there already is not done again. At DEATH, a step of learning or "layer", the last rank kills itself.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

import latmix
from latmix import convert, ranks, sharding
from latmix.archs import ARCHS
from latmix.distill import Answers, Step, Teacher, generate, generated, learn, tune
from latmix.layerwise import learn_layers
from latmix.model.attach import attach
from latmix.model.checkpoint import share
from latmix.model.inputs import quantize_inputs
from latmix.model.maps import build_maps
from latmix.model.parts import layers
from latmix.numerics import parse_format
from latmix.progress import Progress
from latmix.recipe import Layerwise, Learning, Tuning
from latmix.recipes import find
from tests.models import codes_of, free_parts, perturb, rounded
from tests.test_distill import WINDOWS, student_of, teacher

LEARNING = Learning(steps=6, batch=4, evaluate_every=2, lr=2e-3, checkpointing=True)
TUNING = Tuning(steps=6, batch=4, evaluate_every=2, codes_lr=0.02)
LLAMA, FORMAT = ARCHS["llama"], parse_format("mxfp4:scale=even")
WINDOW = {"calibration.windows": "20", "calibration.window": "32"}
RUNS = {
    "calibrated": ("wush", WINDOW | {"calibration.held_out": "4", "folded.values": "none", "quantizer": "gptaq"}),
    "plain": ("quarot-rtn", WINDOW | {"calibration.held_out": "0"}),
}
STEPS = {"tuning.steps": "6", "tuning.batch": "4", "tuning.evaluate_every": "2"}
ABOUT = {"whole": ("block-hadamard", WINDOW | STEPS | {"calibration.held_out": "4"})}
Take = Callable[[Step], None]


def sharded(model):
    for part in (model.get_submodule(LLAMA.embedding), model.get_submodule(LLAMA.head), *layers(model, LLAMA)):
        sharding.shard(part)
    sharding.join_layers(model.base_model)
    return model


def in_parts():
    return Teacher(lambda: sharded(teacher()), sharded(teacher()).get_output_embeddings(), "")


def learned(folder: Path, name: str, take: Take) -> dict[str, Tensor]:
    attached = student_of(sharded(teacher()), "qr", weights=True, share=lambda model: sharded(teacher()))
    perturb(attached.maps, 0.1)  # with nothing rounded, only maps that are no rotations have something to learn
    with nullcontext() if name == "rounded" else attached.unquantized():
        learn(
            attached,
            in_parts(),
            WINDOWS[:8],
            WINDOWS[8:11],
            LEARNING,
            0,
            take,
            folder / f"{name}.snapshot",
        )
    held = sum(sharding.held(parameter).numel() for parameter in attached.model.parameters())
    (folder / f"{name}.held.{ranks.rank()}").write_text(str(held))
    return attached.maps.state_dict()


def tuned(folder: Path, take: Take) -> dict[str, Tensor]:
    model = teacher()
    student = share(model)
    quantized = rounded(student, LLAMA, FORMAT)
    unrounded = {path: model.get_parameter(f"{path}.weight") for path in quantized}
    parts = free_parts(student, LLAMA, quantized, unrounded, TUNING)
    quantize_inputs(student, LLAMA, build_maps(LLAMA, model.config, {}, {}, block=32, seed=0), FORMAT)
    tune(student, parts, in_parts(), WINDOWS[:8], WINDOWS[:3], TUNING, 0, take, folder / "tuned.snapshot")
    for name, tensors in {"tuned": [*parts.latents.values(), *student.buffers()], "kept": parts.kept.values()}.items():
        held = sum(sharding.held(tensor).numel() for tensor in tensors)
        (folder / f"{name}.held.{ranks.rank()}").write_text(str(held))
    codes = {path: q.codes for path, q in codes_of(parts, LLAMA, 2).items()}
    return codes | {name: sharding.whole(part.detach()) for name, part in parts.kept.items()}


def text(folder: Path) -> dict[str, Tensor]:
    """Nine batches that the model writes, the last one short: a rank has one to write that nobody needs. And two of
    answers. Both go on with what is there."""
    place = folder / "text"
    place.mkdir(exist_ok=True)
    with patch.object(generate, "BATCH", 8):
        written = generated(in_parts(), WINDOWS[:8], 68, 0, "float32", place)
    answers = Answers(in_parts(), WINDOWS, place)
    return {"text": written, "answers": answers.logits(torch.arange(len(WINDOWS)))}


def layered(take: Take) -> dict[str, Tensor]:
    """Maps that learned layer by layer, and what they were before."""
    model = sharded(teacher())
    maps = build_maps(LLAMA, model.config, {}, find("flatquant").online, block=32, seed=0)
    before = {f"before/{name}": tensor.clone() for name, tensor in maps.state_dict().items()}
    attached = attach(sharded(teacher()), LLAMA, maps, FORMAT, FORMAT)
    learn_layers(attached, model, WINDOWS[:8], Layerwise(epochs=3, batch=4), 0, Progress())
    return before | {f"after/{name}": tensor for name, tensor in maps.state_dict().items()}


def noted(folder: Path, name: str, work: Callable[[Take], dict[str, Tensor]], also: Take) -> None:
    """The result in a file and the curve in another."""
    if ranks.agreed((folder / f"{name}.json").exists()):
        return
    curve: list[dict[str, float]] = []

    def take(step: Step) -> None:
        told = dataclasses.asdict(step) | {"seconds": 0.0}
        curve.append({key: value for key, value in told.items() if value is not None})
        also(step)

    result = work(take)
    if ranks.first():
        save_file({key: tensor.contiguous().clone() for key, tensor in result.items()}, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(curve))


def all_parts(folder: Path, model: Path, death: str = "") -> None:
    def die() -> None:
        if ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step(step: Step) -> None:
        if str(step.step) == death:
            die()

    for name in ("exact", "rounded"):
        noted(folder, name, lambda take: learned(folder, name, take), on_step if name == "rounded" else lambda _: None)  # noqa: B023
    noted(folder, "tuned", lambda take: tuned(folder, take), lambda _: None)
    noted(folder, "layered", layered, lambda _: None)
    noted(folder, "text", lambda _: text(folder), lambda _: None)
    if death == "layer":
        left, original = [2], convert.quantize_layer

        def second(*arguments: object) -> object:
            left[0] -= 1
            return original(*arguments) if left[0] else die()

        convert.quantize_layer = second
    for name, (recipe, settings) in (RUNS | ABOUT).items():
        with suppress(SystemExit):  # of those that help
            latmix.quantize(model, folder / name, recipe, seed=0, settings=settings)


def main(*arguments: str) -> NoReturn:
    with ranks.together():
        all_parts(Path(arguments[0]), Path(arguments[1]), *arguments[2:])
    sys.exit()


if __name__ == "__main__":
    main(*sys.argv[1:])
