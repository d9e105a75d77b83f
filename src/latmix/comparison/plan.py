"""What a comparison consists of: one cell for each recipe and seed that matters to it, and one for full precision.

A cell's folder is named after its recipe, its seed and a digest of everything that decides what comes out of it: the
model's tensors, the calibration text, the recipe. So a finished cell can be recognised without a ledger that could be
wrong, and one folder holds comparisons on several texts, tasks or settings beside one another: what was computed on
other terms has another name. Given up: recognising that a newer latmix would compute something else.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latmix import recipes
from latmix.comparison.seeds import seeded
from latmix.errors import InputError
from latmix.recipe import Recipe, from_json, override
from latmix.rundir import write_text

FULL_PRECISION = "full precision"
CELLS, TEXTS = "cells", "texts"


@dataclass(frozen=True)
class Measures:
    """What every cell is measured by.

    Attributes:
        text, separator, window: as in `latmix.evaluate`.
        tasks: names of lm-evaluation-harness tasks, each measured and stored by itself.
        task_data: folder of local task files; None: tasks come from the hub.
        task_options: the harness's own (`limit`, `num_fewshot`, …), values as text.
    """

    text: str
    separator: str | None = None
    window: int | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    task_options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One recipe at one seed; `recipe` None is the unquantized model. `folder` is this cell's alone."""

    name: str
    seed: int
    folder: str
    model: str
    calibration: str
    recipe: Recipe | None
    measures: Measures
    text_digest: str

    @property
    def run(self) -> Path:
        return Path(self.folder, "run")

    @property
    def evaluation(self) -> Path:
        """Where perplexity, KL and agreement on this text, cut this way, are or will be."""
        cut = (self.text_digest, self.measures.separator, self.measures.window)
        return Path(self.folder, f"evaluation-{_digest(cut)}.json")

    def task(self, name: str) -> Path:
        """Where that task's result under these options is or will be."""
        terms = (self.measures.task_data, dict(self.measures.task_options))
        return Path(self.folder, f"tasks-{_digest(terms)}", f"{name}.json")

    @property
    def failure(self) -> Path:
        return Path(self.folder, "failure.json")

    @property
    def finished(self) -> bool:
        ran = self.recipe is None or self.run.is_dir()
        return ran and self.evaluation.is_file() and all(self.task(name).is_file() for name in self.measures.tasks)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Cell":
        values = json.loads(text)
        recipe = values.pop("recipe")
        measures = values.pop("measures")
        measures["tasks"] = tuple(measures["tasks"])
        return Cell(
            **values,
            recipe=None if recipe is None else from_json(json.dumps(recipe)),
            measures=Measures(**measures),
        )


def cells(
    model: Path,
    names: Sequence[str],
    out: Path,
    seeds: int,
    calibration: Path,
    measures: Measures,
    settings: Mapping[str, str],
) -> list[Cell]:
    """Full precision first, then recipe by recipe, a single seed where nothing is random. Cost: reads the model's
    tensors and both texts once, to hash them.

    Raises: LatmixError: an unknown recipe or setting, two recipes of one name, a text or model that cannot be read.
    """
    if seeds < 1:
        raise InputError(f"A comparison over {seeds} seeds makes no sense; give at least 1.")
    fixed = (_model_digest(model), file_digest(calibration))
    text_digest = file_digest(Path(measures.text))
    planned: list[tuple[str, int, Recipe | None]] = [(FULL_PRECISION, 0, None)]
    for recipe in (adapted(recipes.find(name), settings) for name in names):
        if any(recipe.name == name for name, _, _ in planned):
            raise InputError(f"Two recipes are called '{recipe.name}'; a row of the table needs a name of its own.")
        different = range(seeds if seeded(recipe) else 1)
        planned += [(recipe.name, seed, dataclasses.replace(recipe, seed=seed)) for seed in different]
    return [
        Cell(
            name=name,
            seed=seed,
            folder=str(out / CELLS / _folder(name, seed, (*fixed, recipe.digest) if recipe else fixed[:1])),
            model=str(model),
            calibration=str(calibration),
            recipe=recipe,
            measures=measures,
            text_digest=text_digest,
        )
        for name, seed, recipe in planned
    ]


def adapted(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with these settings, those left out that belong to a part it does not have: `learning.steps` says
    nothing to a recipe that does not learn."""
    return override(
        recipe,
        {key: value for key, value in settings.items() if getattr(recipe, key.partition(".")[0], "") is not None},
    )


def split_text(text: Path, separator: str, share: float, out: Path) -> tuple[Path, Path]:
    """(calibration, evaluation): the first `share` of the text's documents and the rest, as files below `out`.

    Raises: LatmixError: unreadable, or a share that leaves one side empty.
    """
    documents = _read(text).decode("utf-8").split(separator)
    cut = int(share * len(documents))
    if not 0 < cut < len(documents):
        raise InputError(
            f"A split of {share} leaves nothing on one side of the {len(documents)} documents in '{text}'."
        )
    files = []
    for part, chosen in (("calibration", documents[:cut]), ("evaluation", documents[cut:])):
        content = separator.join(chosen)
        files.append(out / TEXTS / f"{part}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.txt")
        write_text(files[-1], content)
    return files[0], files[1]


def file_digest(path: Path) -> str:
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"The text '{path}' cannot be read: {error.strerror}.") from error


def _model_digest(model: Path) -> str:
    """Of every tensor, so that a model trained further under the same name is another model."""
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    if not files:
        raise InputError(f"The model '{model}' is not a folder with safetensors files.")
    digest = hashlib.sha256((model / "config.json").read_bytes() if (model / "config.json").is_file() else b"")
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _folder(name: str, seed: int, terms: tuple[str, ...]) -> str:
    return f"{name.replace(' ', '-').replace('/', '-')}-{seed}-{_digest(terms)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
