"""A recipe: everything that decides what comes out of a run, as one frozen value.

Formats, transforms and weight quantizers are written as on the command line (`mxfp4:scale=even`, `lu:init=identity`,
`gptq:damping=0.05`) and stay strings here: a recipe is read, stored, hashed and compared; the pipeline parses each of
them once and passes the value on. Presets are functions in `latmix.recipes`.
"""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latmix.errors import LatmixError


def _at_least(key: str, owner: object, **lowest: int) -> None:
    for name, limit in lowest.items():
        if not getattr(owner, name) >= limit:  # NaN fails too
            raise LatmixError(f"Recipe key '{key}.{name}' is {getattr(owner, name)}; it must be at least {limit}.")


@dataclass(frozen=True)
class Calibration:
    """The text a run may look at.

    Attributes:
        windows: token windows to learn and to calibrate on (the paper: 256 sequences).
        held_out: further windows, never learned from, that choose the best step and measure the run.
        window: tokens in a window; capped by the model's longest position.
        separator: what stands between documents, each of which is opened by BOS; None: the text is one document.
    """

    windows: int = 256
    held_out: int = 16
    window: int = 512
    separator: str | None = None

    def __post_init__(self) -> None:
        _at_least("calibration", self, windows=1, held_out=1, window=2)


@dataclass(frozen=True)
class Learning:
    """KL distillation of the transforms to the unquantized model (method of arXiv 2602.17681; defaults by our own
    experiments, docs/log.md).

    Attributes:
        steps: optimizer steps; the learning rate falls on a cosine to a tenth of its start, after a short warmup.
        lr: Adam's peak learning rate.
        batch: windows an optimizer step sees.
        accumulation: forward passes the batch is split over.
        volume: weight of the regulariser (log |det A|)² / n, which keeps a map's volume near one.
        top_k: restrict the KL to the teacher's k most likely tokens, renormalised; None: the whole vocabulary.
        weights: fake-quantize the weights in the loop as well as the activations.
        checkpointing: recompute layers in backward instead of storing their activations.
        evaluate_every: steps between measurements of KL on the held-out windows.
    """

    steps: int = 200
    lr: float = 3e-3
    batch: int = 8
    accumulation: int = 1
    volume: float = 0.01
    top_k: int | None = None
    weights: bool = True
    checkpointing: bool = False
    evaluate_every: int = 20

    def __post_init__(self) -> None:
        _at_least("learning", self, steps=1, batch=1, accumulation=1, evaluate_every=1, volume=0, lr=0)
        if self.accumulation > self.batch:
            raise LatmixError(f"Recipe key 'learning.accumulation' is {self.accumulation}, above learning.batch.")
        if self.top_k is not None and self.top_k < 2:
            raise LatmixError(f"Recipe key 'learning.top_k' is {self.top_k}; it must be at least 2, or none.")


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        name: which preset this grew from.
        weights, activations: formats of the quantized linears; embedding, norms and head keep full precision.
        quantizer: the weight quantizer.
        folded: site → transform, folded into the weights; costs nothing at inference.
        online: input → orthogonal transform applied to activations at run time.
        shift: give every learned folded map a learned shift v, which becomes biases.
        learning: how maps are learned; None leaves them as initialised.
    """

    name: str
    weights: str = "mxfp4:scale=even"
    activations: str = "mxfp4:scale=even"
    quantizer: str = "gptq"
    folded: Mapping[str, str] = field(default_factory=dict)
    online: Mapping[str, str] = field(default_factory=dict)
    shift: bool = False
    learning: Learning | None = None
    calibration: Calibration = Calibration()
    seed: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @property
    def digest(self) -> str:
        """Twelve hex digits that name this recipe's content."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def from_json(text: str) -> Recipe:
    """Raises: LatmixError: not JSON, a key that no recipe has, or a value of the wrong type."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise LatmixError(f"The recipe is not JSON: {error}.") from error
    recipe: Recipe = _build(Recipe, values, "")
    return recipe


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with fields replaced by dotted keys: `{"learning.steps": "50", "folded.values": "qr"}`.

    A value is read as JSON where it is JSON (`50`, `true`), as text otherwise; `none` empties a field or removes a map.

    Raises: LatmixError: unknown key (the known are listed) or a value that is not of the field's type.
    """
    values: dict[str, Any] = dataclasses.asdict(recipe)
    for key, text in settings.items():
        *path, last = key.split(".")
        place, hint = values, Recipe
        for name in path:
            hint = _hint(hint, name, key)
            if place[name] is None:
                place[name] = {}
            place = place[name]
        _hint(hint, last, key)
        place[last] = _value(text)
    result: Recipe = _build(Recipe, values, "")
    return result


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _concrete(hint: Any) -> Any:
    """`X | None` → `X`."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _hint(owner: Any, name: str, key: str) -> Any:
    """The type of field `name` of the dataclass or mapping type `owner`."""
    owner = _concrete(owner)
    if typing.get_origin(owner) is Mapping:
        return typing.get_args(owner)[1]
    hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
    if name not in hints:
        choices = f"'{name}' is none of {', '.join(hints)}" if hints else f"'{name}' has nothing to be inside of"
        raise LatmixError(f"Unknown recipe key '{key}': {choices}.")
    return hints[name]


def _build(hint: Any, value: Any, key: str) -> Any:
    """`value`, as JSON knows it, turned into the type `hint`."""
    kind = _concrete(hint)
    if value is None and kind is not hint:
        return None
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        inside = {
            name: _build(_hint(kind, name, _join(key, name)), part, _join(key, name)) for name, part in value.items()
        }
        required = [part.name for part in dataclasses.fields(kind) if part.default is part.default_factory]
        if absent := [name for name in required if name not in inside]:
            raise LatmixError(f"The recipe lacks '{_join(key, absent[0])}'.")
        return kind(**inside)
    if typing.get_origin(kind) is Mapping and isinstance(value, dict):
        return {name: _build(str, part, _join(key, name)) for name, part in value.items() if part is not None}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise LatmixError(f"Recipe key '{key}' takes {getattr(kind, '__name__', kind)}, not {value!r}.")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
