"""A learning stage on disk: everything that its next step depends on, in one file that is there whole or not at all.

The order of the windows is a function of the seed and the teacher's answers have a file of their own, so what learned,
its average, Adam's moments, the best state and the curve are all there is: a stage that goes on takes the same steps,
bit for bit, and reports the whole curve again. A file that belongs to other steps is refused by the name of what
differs. Given up: going on with another schedule.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from latmix import ranks, sharding
from latmix.errors import DamagedError, InputError
from latmix.recipe import Distillation
from latmix.rundir import written

DOUBT = 4.0
"""Standard errors. Of thirty measurements of the same the lowest is low by two or three."""

FREE = ("checkpointing",)
"""Keys of a schedule that change no bit of the result."""

LEARNED, BEST, AVERAGE, MOMENTS = "learned/", "best/", "average/", "adam/"  # prefixes of tensors
LOWEST = "lowest"
CHECKSUM = "sha256"


@dataclass(frozen=True)
class Step:
    """One line of the learning curve.

    Attributes:
        gradient: norm of the gradient.
        held_out: mean KL, nats a token, only where it was measured.
    """

    step: int
    loss: float
    lr: float
    gradient: float
    seconds: float
    held_out: float | None = None


@dataclass
class Course:
    """How far a stage has come: the steps so far, from step 0, what was kept of the best of them, the average of what
    they learned, empty where none is taken, and the KL of each held-out window where their mean was lowest."""

    curve: list[Step]
    best_state: dict[str, Tensor]
    average: dict[str, Tensor]
    lowest: Float[Tensor, " held_out"]

    def accepts(self, found: Float[Tensor, " held_out"]) -> bool:
        """Whether the student that has this KL on each held-out window is the best so far.

        A single step is when its mean is the lowest. An average of steps gets better as long as they do, by less than
        a few windows can tell, and the lowest of many measurements is low by chance: so it is unless it is worse
        than the lowest by more than `DOUBT` standard errors of the difference (as in the one-standard-error rule of
        Breiman et al. 1984).
        """
        worse = found - self.lowest
        if worse.mean() < 0:
            self.lowest = found
            return True
        return bool(self.average) and bool(worse.mean() <= DOUBT * worse.std() / math.sqrt(len(worse)))

    @property
    def step(self) -> int:
        return self.curve[-1].step

    @property
    def measured(self) -> list[float]:
        """The KL on the held-out windows, whenever it was measured."""
        return [step.held_out for step in self.curve if step.held_out is not None]

    @property
    def best(self) -> float:
        return min(self.measured)


def identity(schedule: Distillation, seed: int, **windows: Int[Tensor, "_ _"]) -> dict[str, Any]:
    """What the steps of a stage follow from, besides the model and its student."""
    settings = {f"{schedule.key}.{name}": value for name, value in dataclasses.asdict(schedule).items()}
    digests = {name: hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12] for name, ids in windows.items()}
    return {key: value for key, value in settings.items() if key.split(".")[1] not in FREE} | {"seed": seed, **digests}


def save(path: Path, identity: Mapping[str, Any], course: Course, learned: nn.Module, optimizer: Optimizer) -> None:
    """All ranks call this, and the first writes.

    Raises: WriteError: the file cannot be written, and the one before is still there.
    """
    tensors = {f"{LEARNED}{name}": tensor for name, tensor in learned.state_dict().items()}
    tensors |= {f"{BEST}{name}": tensor for name, tensor in course.best_state.items()}
    tensors |= {f"{AVERAGE}{name}": tensor for name, tensor in course.average.items()} | {LOWEST: course.lowest}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{MOMENTS}{index}/{name}": tensor for name, tensor in moments.items()}
    curve = [dataclasses.asdict(step) for step in course.curve]
    notes = {"identity": json.dumps(identity), "curve": json.dumps(curve)}
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        together = sharding.whole(tensor.detach())
        if ranks.first():  # cloned: safetensors refuses tensors that share memory
            gathered[name] = together.cpu().clone(memory_format=torch.contiguous_format)
    if ranks.first():
        _write(path, gathered, notes)


def _write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    with written(path) as temporary:
        try:
            save_file(dict(tensors), temporary, {**notes, CHECKSUM: _checksum(tensors, notes)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: Path, identity: Mapping[str, Any], learned: nn.Module, optimizer: Optimizer) -> Course | None:
    """Put the student and the optimizer where they were, if there is a snapshot.

    Raises:
        InputError: it is of other steps; names what differs.
        DamagedError: it cannot be read, or does not fit the student.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            notes, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if notes.pop(CHECKSUM, None) != _checksum(tensors, notes):
            raise ValueError("its content does not match its checksum.")
        _compare(path, json.loads(notes["identity"]), json.loads(json.dumps(identity)))
        into = learned.state_dict()
        learned.load_state_dict(_sharded(_below(LEARNED, tensors), into))
        _restore(optimizer, _below(MOMENTS, tensors))
        curve = [Step(**step) for step in json.loads(notes["curve"])]
        best, average = (_sharded(_below(kind, tensors), into) for kind in (BEST, AVERAGE))
        return Course(curve, best, average, tensors[LOWEST])
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"The snapshot '{path}' cannot be read, remove it to start afresh: {error}") from error


def _sharded(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the devices, and in the parts, of those of the same names."""
    like = {name: into.get(name, tensor) for name, tensor in tensors.items()}
    return {name: sharding.sharded_like(tensor.to(like[name].device), like[name]) for name, tensor in tensors.items()}


def _restore(optimizer: Optimizer, moments: Mapping[str, Tensor]) -> None:
    state, parameters = optimizer.state_dict(), [each for group in optimizer.param_groups for each in group["params"]]
    for name, tensor in moments.items():
        index, _, moment = name.partition("/")
        parameter = parameters[int(index)]
        # in the layout of the parameter, which decides how the arithmetic goes through memory
        alike = tensor.shape == parameter.shape
        value = torch.empty_like(parameter).copy_(sharding.sharded_like(tensor, parameter)) if alike else tensor.clone()
        state["state"].setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict(state)


def _checksum(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _compare(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key in [*was, *now]:
        if was.get(key) != now.get(key):
            raise InputError(
                f"The snapshot '{path}' is of {key} {was.get(key)}, and now it is {now.get(key)}; go on with the same "
                "settings and text, or remove it to start afresh."
            )
