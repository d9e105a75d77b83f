"""A run in the making: `OUT.partial`, which outlives whoever works in it and becomes `OUT` when everything is done.

Each result is written whole or not at all (`rundir.written`), so whatever a killed process left, the same command goes
on from the last result that has its name. What the run is made from is noted first; what may differ when it goes on is
said in one table. The lock is the system's and ends with the process that holds it. Given up: several processes on one
run, and file systems without flock.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from latmix.errors import DamagedError, DivergedError, InputError, LatmixError, WriteError
from latmix.progress import Progress
from latmix.recipe import Recipe
from latmix.rundir import (
    INPUTS,
    JOURNAL,
    LOCK,
    LOG,
    RECIPE,
    SUMMARY,
    locked,
    partial_of,
    read_json,
    write_json,
    write_text,
)
from latmix.seal import compare_noted, finish, noted

WORK = "work"
GENERATE, ASK, LEARN, LAYERS, TUNE = "generate", "ask", "learn", "quantize", "tune"

BEGUN: Mapping[str, str] = MappingProxyType(
    {
        GENERATE: "generated.*",
        ASK: "answers.*",
        LEARN: f"{LEARN}.snapshot*",
        LAYERS: "quantized-layer-*",
        TUNE: f"{TUNE}.snapshot*",
    }
)
"""What each stage that takes long leaves behind first."""

MAY_CHANGE: Mapping[str, str | None] = MappingProxyType(
    {
        "recipe.name": None,
        "recipe.learning.checkpointing": None,
        "recipe.tuning.checkpointing": None,
        "recipe.quantizer": LAYERS,
        "recipe.tuning": TUNE,
    }
)
"""What may differ when a run goes on, until the stage has begun that reads it (None: always, it changes no bit of the
result). A key stands for everything below it. All else, and every input, has to be the same."""

_NOTHING = "nothing"


@dataclass(frozen=True)
class Workspace:
    """Attributes: folder: what becomes the run."""

    folder: Path

    @property
    def work(self) -> Path:
        """What only a run in the making needs: hidden states, the teacher's text and answers, snapshots, the layers
        before tuning."""
        return self.folder / WORK

    def snapshot(self, stage: str) -> Path:
        """Where a learning stage is kept while it runs."""
        return self.work / f"{stage}.snapshot"

    def begun(self, stage: str) -> bool:
        return any(self.folder.rglob(BEGUN[stage]))


@contextmanager
def workspace(
    out: Path, recipe: Recipe, inputs: Callable[[], Mapping[str, Any]], progress: Progress
) -> Iterator[Workspace]:
    """The run in the making, new or gone on with; when the block ends well, it has become `out`.

    Where the block fails all is kept, unless no stage that takes long has begun: then nothing is left behind.
    inputs: what the run is made from, by content; asked once nobody else works here.
    progress: told of what is read for checksums.

    Raises: LatmixError: `out` exists, another process works on it, what is there is of another recipe or of other
        inputs, or it cannot be written.
    """
    space = Workspace(partial_of(out))
    kept = f"What is finished stays in '{space.folder}'; the same command goes on from there."
    try:
        space.work.mkdir(parents=True, exist_ok=True)
        with locked(space.folder):
            partial_of(out)  # whoever had the lock may have finished
            _identify(space, recipe, inputs, progress)
            try:
                yield space
            except LatmixError as error:
                if any(map(space.begun, BEGUN)):
                    if isinstance(error, DivergedError):  # and would again
                        raise
                    raise type(error)(f"{error} {kept}") from error
                shutil.rmtree(space.folder, ignore_errors=True)
                raise
            shutil.rmtree(space.work)
            finish(space.folder, out, progress)
    except OSError as error:
        raise WriteError(f"Cannot write to '{space.folder}': {error.strerror or error}. {kept}") from error


def _identify(space: Workspace, recipe: Recipe, inputs: Callable[[], Mapping[str, Any]], progress: Progress) -> None:
    """Note what the run is made from, or compare it with what is noted."""
    folder = space.folder
    strange = sorted({path.name for path in folder.iterdir()} - {LOCK, JOURNAL, WORK, RECIPE, LOG})
    if strange and not (folder / INPUTS).exists():
        raise DamagedError(f"'{folder}' holds '{strange[0]}' but no {INPUTS}: it is no run of latmix; remove it first.")
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink()
    compare_noted(folder, progress)
    if (folder / SUMMARY).exists():  # of what is noted nothing is missing any more, and nothing is made again
        for name in noted(folder):
            if "/" not in name and not (folder / name).exists():
                raise DamagedError(f"'{folder / name}' was written and is gone; remove '{folder}' and begin again.")
    (folder / JOURNAL).touch()
    found = inputs()
    if (folder / INPUTS).exists():
        now = {"recipe": json.loads(recipe.to_json()), **found}
        before = {"recipe": read_json(folder / RECIPE), **read_json(folder / INPUTS)}
        _compare(space, before, now)
        if before == now:
            return
    write_text(folder / RECIPE, recipe.to_json() + "\n")
    write_json(folder / INPUTS, found)


def _compare(space: Workspace, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = dict(_leaves(then)), dict(_leaves(now))
    for key in sorted(before.keys() | after.keys()):
        was, now_is = before.get(key, _NOTHING), after.get(key, _NOTHING)
        if was != now_is and not _may_change(space, key):
            raise InputError(
                f"'{space.folder}' holds a run with {key.removeprefix('recipe.')} {was}, and now it is {now_is}; "
                "go on with the same settings and files, choose another --out, or remove the folder."
            )


def _may_change(space: Workspace, key: str) -> bool:
    rules = [stage for name, stage in MAY_CHANGE.items() if key == name or key.startswith(f"{name}.")]
    return any(stage is None or not space.begun(stage) for stage in rules)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what stands there."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else name)
    else:
        yield key, value
