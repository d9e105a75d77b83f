"""`latmix analyze`: from a model and a text to tables of errors, and figures of them.

The text is cut in two: maps are learned on the activations of its first half, everything is measured on the second.
Activations are those of the unquantized model, norm gains absorbed. For perplexity the model's inputs at the site pass
through x → T⁻¹(Q(T(x))) and nothing else is quantized: just the error that E(T) measures, seen from the other end of
the model, without what RMSNorm makes of a folded map. Given up: folding each candidate (that is what a run does).
"""

import csv
import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from latmix.analysis.amplitudes import EDGES, amplitudes
from latmix.analysis.bound import bounds
from latmix.analysis.candidates import CANDIDATES, ORTHOGONAL
from latmix.analysis.optimum import closed_form
from latmix.assets import CALIBRATION
from latmix.data import Corpus, read_text, windows
from latmix.errors import InputError
from latmix.eval import score
from latmix.eval.activations import Place, collect, places
from latmix.eval.errors import block_errors, error, through
from latmix.model.fold import absorb_gains
from latmix.model.inputs import watch
from latmix.model.load import Loaded, load
from latmix.model.parts import layers
from latmix.numerics import BlockFormat, parse_format
from latmix.progress import Progress
from latmix.rundir import new_run, write_json
from latmix.transforms import Hadamard, Transform

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class Question:
    """What to analyze.

    Attributes:
        text: learned from and measured on, half each; None: the calibration text of the package.
        separator: what stands between documents.
        site: a site or input, with or without a layer (`latmix.eval.activations`); its places share one map.
        format, blocks: the format, and the block sizes to compare; details are given at the format's own.
        window, windows, tokens: tokens in a window, windows and tokens at most in either half.
    """

    text: Path | None = None
    separator: str | None = None
    site: str = "residual"
    format: str = "mxfp4:scale=even"
    blocks: tuple[int, ...] = (8, 16, 32, 64, 128)
    window: int = 256
    windows: int = 32
    tokens: int = 4096
    seed: int = 0


def analyze(model: Path | str, out: Path | str, question: Question, progress: Progress | None = None) -> Path:
    """Write `*.csv` and `analysis.json` into the new folder `out`; returns it.

    Raises: LatmixError: bad input, in one sentence; nothing is left behind.
    """
    fmt, progress = parse_format(question.format), progress or Progress()
    corpus = read_text(question.text or CALIBRATION, question.separator)
    with new_run(Path(out)) as folder:
        loaded = load(model)
        absorb_gains(loaded.model, loaded.arch)
        spots = places(loaded.arch, len(layers(loaded.model, loaded.arch)), question.site)
        taught, held_out = halves(loaded, corpus, question)
        seen = [collect(loaded, part, question.tokens, question.seed) for part in (taught, held_out)]
        pooled = [torch.cat([half[spot] for spot in spots]) for half in seen]
        write_csv(folder / "places.csv", _places(seen[0], seen[1], fmt))
        sizes = sorted({*question.blocks, fmt.block} & set(range(1, pooled[0].shape[-1] + 1)))
        progress.stage("maps", len(sizes) * len(CANDIDATES.names()))
        results = {size: _candidates(pooled[0], _sized(fmt, size), question.seed, progress) for size in sizes}
        write_csv(folder / "errors.csv", _errors(results, pooled[1], fmt))
        write_csv(folder / "blocks.csv", _blocks(results[fmt.block], pooled[1], fmt))
        write_csv(folder / "maps.csv", _maps(results[fmt.block], pooled[0], pooled[1], fmt))
        write_csv(folder / "amplitudes.csv", _histograms(results[fmt.block], pooled[1], fmt))
        write_csv(folder / "perplexity.csv", _perplexities(loaded, results, spots, held_out, fmt, progress))
        about = dataclasses.asdict(question) | {"text": corpus.source, "sha256": corpus.digest, "model": str(model)}
        write_json(folder / "analysis.json", about | {"date": str(datetime.date.today())})
    return Path(out)


def halves(loaded: Loaded, corpus: Corpus, question: Question) -> tuple[Tensor, Tensor]:
    """Windows (some, window) to learn from and to measure on: of the text's first half and of its second.

    Raises: LatmixError: the text is too short for two.
    """
    every = windows(corpus, loaded.tokenizer, min(question.window, loaded.longest), loaded.vocabulary)
    if len(every) < 2:
        raise InputError(f"The text '{corpus.source}' holds one window only; an analysis needs two halves.")
    half = len(every) // 2
    return _spread(every[:half], question.windows), _spread(every[half:], question.windows)


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    listed = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(listed[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in listed)


def _spread(windows: Int[Tensor, "windows window"], count: int) -> Int[Tensor, "some window"]:
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def _sized(fmt: BlockFormat, block: int) -> BlockFormat:
    return dataclasses.replace(fmt, block=block)


Maps = Mapping[str, Transform | None]


def _candidates(x: Float[Tensor, "tokens n"], fmt: BlockFormat, seed: int, progress: Progress) -> Maps:
    maps = {}
    for name, make in CANDIDATES.items():
        maps[name] = make(x, fmt, seed)
        progress.advance(f"{name} at block {fmt.block}")
    return maps


def _errors(results: Mapping[int, Maps], x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Iterable[Row]:
    """E(T) by block size and map, with the share that is left of the best orthogonal map's error, and both bounds."""
    for block, maps in results.items():
        sized = _sized(fmt, block)
        found = {name: error(map, x, sized) for name, map in maps.items()}
        best = min(found[name] for name in ORTHOGONAL)
        for name, value in found.items():
            limit = bounds(maps[name] or Hadamard(x.shape[-1], 1), x, sized)  # Hadamard of order 1: the identity
            row: Row = {"block": block, "map": name, "error": value, "relative": value / float(x.square().mean())}
            yield row | {"of_best_orthogonal": value / best} | dataclasses.asdict(limit)


def _blocks(maps: Maps, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Iterable[Row]:
    for name, map in maps.items():
        for index, value in enumerate(block_errors(map, x, fmt).tolist()):
            yield {"map": name, "block": index, "error": value}


def _maps(maps: Maps, taught: Tensor, x: Tensor, fmt: BlockFormat) -> Iterable[Row]:
    """What each map does to the distribution; `predicted`: the closed form's promise against a rotation."""
    promise = closed_form(taught).ratio
    for name, map in maps.items():
        row: Row = {"map": name, "predicted": promise if name == "optimum" else ""}
        found = dataclasses.asdict(amplitudes(map, x, fmt))
        yield row | {key: value for key, value in found.items() if key != "histogram"}


def _histograms(maps: Maps, x: Float[Tensor, "tokens n"], fmt: BlockFormat) -> Iterable[Row]:
    for name, map in maps.items():
        for low, high, share in zip(EDGES, EDGES[1:], amplitudes(map, x, fmt).histogram, strict=False):
            yield {"map": name, "low": low, "high": high, "share": share}


def _places(taught: Mapping[Place, Tensor], seen: Mapping[Place, Tensor], fmt: BlockFormat) -> Iterable[Row]:
    """Where the error sits: every input of every layer, without a map, with block-Hadamard, at its optimum."""
    for place, x in seen.items():
        energy = float(x.square().mean())
        own = closed_form(taught[place])
        chosen = {"none": None, "block-hadamard": Hadamard(x.shape[-1], fmt.block), "optimum": own.map}
        row: Row = {"place": str(place), "energy": energy}
        for name, map in chosen.items():
            row[name] = error(map, x, fmt) / energy
        yield row | {"predicted": own.ratio}


def _perplexities(
    loaded: Loaded,
    results: Mapping[int, Maps],
    spots: list[Place],
    held_out: Int[Tensor, "windows window"],
    fmt: BlockFormat,
    progress: Progress,
) -> Iterable[Row]:
    progress.stage("perplexity", sum(len(maps) for maps in results.values()))
    yield {"block": 0, "map": "unquantized", "perplexity": score(loaded.model, held_out, batch=1).perplexity.mean}
    for block, maps in results.items():
        for name, map in maps.items():
            sized = _sized(fmt, block)
            hooks = [
                watch(owner, loaded.arch.input(spot.input), lambda x, m=map, f=sized: through(m, x, f))  # type: ignore[misc]
                for spot in spots
                for owner in [layers(loaded.model, loaded.arch)[spot.layer]]
            ]
            try:
                found = score(loaded.model, held_out, batch=1).perplexity.mean
            finally:
                for hook in hooks:
                    hook.remove()
            progress.advance()
            yield {"block": block, "map": name, "perplexity": found}
