"""A recipe: everything that decides what comes out of a run, as one frozen value.

Formats, transforms and weight quantizers are written as on the command line (`mxfp4:scale=even`, `lu:init=identity`,
`gptq:damping=0.05`) and stay strings here: a recipe is read, stored, hashed and compared; the pipeline parses each of
them once and passes the value on. Presets are functions in `latmix.recipes`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from latmix.errors import InputError
from latmix.typed import build, parsed, replaced

OBJECTIVES = ("kl", "cross-entropy")
COMPUTE = ("float32", "bfloat16")


def _at_least(key: str, owner: object, **lowest: int) -> None:
    for name, limit in lowest.items():
        if not getattr(owner, name) >= limit:  # NaN fails too
            raise InputError(f"Recipe key '{key}.{name}' is {getattr(owner, name)}; it must be at least {limit}.")


@dataclass(frozen=True)
class Calibration:
    """The text a run may look at.

    Attributes:
        windows: token windows to learn and to calibrate on (the paper: 256 sequences).
        generated: further windows, which the unquantized model writes itself (`latmix.distill.generate`), to learn and
            tune on; nothing else sees them.
        held_out: further windows, never learned from, that choose the best step and measure the run; 0 where nothing
            learns: then nothing is measured.
        window: tokens in a window; capped by the model's longest position.
        separator: what stands between documents, each of which is opened by BOS; None: the text is one document.
    """

    windows: int = 256
    generated: int = 0
    held_out: int = 16
    window: int = 512
    separator: str | None = None

    def __post_init__(self) -> None:
        _at_least("calibration", self, windows=1, generated=0, held_out=0, window=2)


@dataclass(frozen=True)
class Distillation:
    """What every learning stage has: steps of Adam on a divergence from the unquantized model, or from the text.

    Attributes:
        steps: optimizer steps; the learning rate falls on a cosine to a tenth of its start, after a short warmup.
        lr: Adam's peak learning rate.
        batch: windows an optimizer step sees.
        accumulation: forward passes the batch is split over.
        top_k: restrict the KL to the teacher's k most likely tokens, renormalised; None: the whole vocabulary.
        checkpointing: recompute layers in backward instead of storing their activations.
        evaluate_every: steps between measurements of KL on the held-out windows.
        average: keep the mean of the last quarter of the steps (`latmix.distill.average`) from the latest measurement
            that is no worse beyond doubt, instead of the step that did best on the held-out windows.
        objective: "kl", the divergence of the quantized model's distribution from the unquantized one's, or
            "cross-entropy", with the text (which needs no teacher).
        compute: "float32", or "bfloat16" for the products with activations; maps and the weights they move stay in
            float32.
    """

    steps: int = 200
    lr: float = 1e-3
    batch: int = 8
    accumulation: int = 1
    top_k: int | None = None
    checkpointing: bool = False
    evaluate_every: int = 20
    average: bool = False
    objective: str = "kl"
    compute: str = COMPUTE[0]

    key: ClassVar[str]

    def __post_init__(self) -> None:
        _at_least(self.key, self, steps=1, batch=1, accumulation=1, evaluate_every=1, lr=0)
        if self.accumulation > self.batch:
            raise InputError(f"Recipe key '{self.key}.accumulation' is {self.accumulation}, above {self.key}.batch.")
        for name, choices in (("objective", OBJECTIVES), ("compute", COMPUTE)):
            if (value := getattr(self, name)) not in choices:
                raise InputError(f"Recipe key '{self.key}.{name}' is '{value}'; known: {', '.join(choices)}.")
        if self.top_k is not None and self.top_k < 2:
            raise InputError(f"Recipe key '{self.key}.top_k' is {self.top_k}; it must be at least 2, or none.")


@dataclass(frozen=True)
class Learning(Distillation):
    """Learning of the maps (method of arXiv 2602.17681; defaults by our own experiments, docs/log.md).

    Attributes:
        volume: weight of the regulariser (log |det A|)² / n, which keeps a map's volume near one.
        weights: fake-quantize the weights in the loop as well as the activations.
    """

    volume: float = 0.01
    weights: bool = True

    key: ClassVar[str] = "learning"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self.key, self, volume=0)


@dataclass(frozen=True)
class Tuning(Distillation):
    """Tuning of what is free at inference, after the weights are quantized.

    Attributes:
        lr: peak learning rate of gains and biases; of embedding and head in units of their root mean square.
        kept: parts in full precision that learn: "gains", "embedding", "head".
        biases: inputs of the architecture (qkv, o, gate_up, down) whose readers get a bias that learns.
        codes: every code may move to a neighbour on the grid (`latmix.model.latent`).
        codes_lr: peak learning rate of what codes are rounded from, in units of the scale.
        damping: how far the last step draws that back to its code, as a share of the way; the steps before it draw
            less, those of the first three tenths not at all (`latmix.distill.tune`).
    """

    steps: int = 1200
    lr: float = 2e-3
    average: bool = True
    kept: tuple[str, ...] = ("gains", "embedding", "head")
    biases: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
    codes: bool = True
    codes_lr: float = 3e-3
    damping: float = 3e-3

    key: ClassVar[str] = "tuning"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self.key, self, codes_lr=0, damping=0)
        if self.damping > 1:
            raise InputError(f"Recipe key 'tuning.damping' is {self.damping}; it must be at most 1.")


@dataclass(frozen=True)
class Layerwise:
    """Learning of the online maps one decoder layer at a time, on the squared error of the layer's output.

    Attributes:
        epochs: passes over the calibration windows, for each layer.
        lr: AdamW's peak learning rate; a cosine takes it to a tenth.
        batch: windows an optimizer step sees.
        weights: fake-quantize the weights as well as the activations.
    """

    epochs: int = 15
    lr: float = 5e-3
    batch: int = 8
    weights: bool = True

    def __post_init__(self) -> None:
        _at_least("layerwise", self, epochs=1, batch=1, lr=0)


@dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        name: which preset this grew from.
        weights, activations: formats of the quantized linears; embedding, norms and head keep full precision.
            Activations None: they are left alone (W4A16).
        quantizer: the weight quantizer.
        folded: site → transform, folded into the weights; costs nothing at inference. With `shift=full` or
            `shift=layers` (`latmix.model.maps.SHIFTS`) it has a learned shift v, which becomes biases.
        online: input → transform applied to activations at run time, its inverse folded into the readers; one for each
            layer where it has something to learn or to fit.
        target: the export that has to be able to express the run (`latmix.targets`): what it cannot is left out before
            anything is learned; None: nothing is left out.
        layerwise: how each layer's own maps are learned, before anything else; None: not so.
        learning: how maps are learned end to end; None leaves them as they are.
        tuning: how free parts are tuned after the weights are quantized; None leaves them.
    """

    name: str
    weights: str = "mxfp4:scale=even"
    activations: str | None = "mxfp4:scale=even"
    quantizer: str = "gptq"
    folded: Mapping[str, str] = field(default_factory=dict)
    online: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    layerwise: Layerwise | None = None
    learning: Learning | None = None
    tuning: Tuning | None = None
    calibration: Calibration = Calibration()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.calibration.held_out and (self.learning or self.tuning):
            raise InputError("Recipe key 'calibration.held_out' is 0; learning needs some to choose the best step.")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @property
    def digest(self) -> str:
        """Twelve hex digits that name this recipe's content."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def from_json(text: str) -> Recipe:
    """Raises: LatmixError: not JSON, a key that no recipe has, or a value of the wrong type."""
    try:
        values = parsed(text)
    except ValueError as error:
        raise InputError(f"The recipe is not JSON: {error}.") from error
    recipe: Recipe = build(Recipe, values)
    return recipe


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """The recipe with fields replaced by dotted keys (`latmix.typed.replaced`)."""
    return replaced(recipe, settings)
