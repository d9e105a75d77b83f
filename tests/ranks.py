"""What the processes of `test_ranks.py` run, a tiny model learning: `torchrun … tests/ranks.py FOLDER [STEP]`.

At that step the last rank kills itself. In FOLDER there are then, for learning with nothing rounded and for learning as
it is, the maps and the curve (`result`).
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from latmix.distill import Step, learn, ranks
from latmix.recipe import Learning
from tests.models import perturb
from tests.test_distill import WINDOWS, student_of, teacher

LEARNING = Learning(steps=6, batch=4, evaluate_every=2, lr=2e-3, checkpointing=True)


def learned(folder: Path, rounded: bool, take: Callable[[Step], None] = lambda step: None) -> None:
    model, curve = teacher(), []
    attached = student_of(model, "qr", weights=True)
    perturb(attached.maps, 0.1)  # with nothing rounded, only maps that are no rotations have something to learn

    def note(step: Step) -> None:
        told = dataclasses.asdict(step) | {"seconds": 0.0}
        curve.append({key: value for key, value in told.items() if value is not None})
        take(step)

    name = "rounded" if rounded else "exact"
    with nullcontext() if rounded else attached.unquantized():
        learn(attached, model, WINDOWS[:8], WINDOWS[8:11], LEARNING, 0, note, folder / f"{name}.snapshot")
    shards = [p.to_local() if hasattr(p, "to_local") else p for p in attached.model.parameters()]
    if ranks.rank() == 0:
        attached.maps.save(folder / f"{name}.safetensors")
        result = {"curve": curve, "held": sum(p.numel() for p in shards)}
        (folder / f"{name}.json").write_text(json.dumps(result))


def main(folder: Path, last_step: int | None) -> None:
    def die(step: Step) -> None:
        if step.step == last_step and ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with ranks.together():
        for rounded in (False, True):
            learned(folder, rounded, die if rounded else lambda step: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
