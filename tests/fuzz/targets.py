"""What latmix reads from others, each as a function of bytes: it returns, or raises a `LatmixError` of one sentence.

A target is given an empty folder to put files into. `seeds` are valid inputs, from which wrong ones are made.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from hypothesis import strategies as st

from latmix.analysis.report import report
from latmix.archs import ARCHS
from latmix.assets import DEMO_MODEL
from latmix.cli.terminal import settings
from latmix.data import calibration_windows, read_text
from latmix.eval.activations import places
from latmix.eval.kept import SUFFIX, kept
from latmix.export.base import MANIFEST
from latmix.export.folder import VERSION, open_export
from latmix.model.load import load_tokenizer
from latmix.model.maps import build_transform
from latmix.model.shards import INDEX, read_header, stored_tensors
from latmix.model.source import open_source
from latmix.numerics import FORMATS, SCALE_RULES, parse_format
from latmix.recipe import Calibration, from_json, override
from latmix.recipes import RECIPES, find
from latmix.rundir import JOURNAL, METRICS, RECIPE, SUMMARY, SUMS
from latmix.seal import check, compare_noted, seal
from latmix.transforms import INITIALS, TRANSFORMS
from latmix.weights import parse_quantizer
from tests.fuzz.strategies import edited_bytes, edited_json, edited_text
from tests.models import tiny

JSON, TEXT, BYTES = edited_json, edited_text, edited_bytes
TARGETS: dict[str, "Target"] = {}
Check = Callable[[bytes, Path], object]


@dataclass(frozen=True)
class Target:
    """Attributes: cost: how many times as long as a parser an input takes, for those who count inputs."""

    check: Check
    kind: Callable[[Sequence[Any]], st.SearchStrategy[bytes]]
    seeds: Sequence[Any]
    cost: int = 1

    @property
    def inputs(self) -> st.SearchStrategy[bytes]:
        return self.kind(self.seeds)

    def examples(self) -> list[bytes]:
        """The seeds as a file would hold them."""
        return [seed if isinstance(seed, bytes) else _text(seed).encode() for seed in self.seeds]


def _text(seed: Any) -> str:
    return seed if isinstance(seed, str) else json.dumps(seed)


def target(
    name: str, kind: Callable[[Sequence[Any]], st.SearchStrategy[bytes]], seeds: Sequence[Any], cost: int = 1
) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        TARGETS[name] = Target(check, kind, seeds, cost)
        return check

    return add


def words(data: bytes) -> str:
    """As Python reads a command line: what is not UTF-8 becomes lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


@target("formats", TEXT, [*FORMATS, *(f"mxfp4:block=16,scale={rule},rounding=away" for rule in SCALE_RULES["e8m0"])])
def _format(data: bytes, _: Path) -> None:
    assert parse_format(str(parse_format(words(data)))) == parse_format(words(data))


@target("weight quantizers", TEXT, ["rtn", "gptq:damping=0.05,act_order=false", "gptq:columns=64"])
def _quantizer(data: bytes, _: Path) -> object:
    return parse_quantizer(words(data))


@target("transforms", TEXT, [*TRANSFORMS, *(f"lu:init={i},block=8,shift=full" for i in INITIALS)], cost=3)
def _transform(data: bytes, _: Path) -> object:
    return build_transform(words(data), 8, 8, 0)


@target("settings", TEXT, ["learning.steps=5", "folded.values=qr", "tuning.kept=gains,head", "target=none", "seed=3"])
def _settings(data: bytes, _: Path) -> object:
    return override(find("latmix-plus"), settings([words(data)])).digest


@target("places", TEXT, ["residual", "qkv/0", "down/1"])
def _places(data: bytes, _: Path) -> object:
    return places(ARCHS["llama"], 2, words(data))


@target("recipe names", TEXT, [*RECIPES, "recipe.json"])
def _recipe_name(data: bytes, _: Path) -> object:
    return find(words(data))


@target("recipe files", JSON, [json.loads(RECIPES[name]().to_json()) for name in ("gptq", "latmix-lu", "latmix-plus")])
def _recipe(data: bytes, folder: Path) -> None:
    (folder / "recipe.json").write_bytes(data)
    recipe = find(str(folder / "recipe.json"))
    assert from_json(recipe.to_json()) == recipe


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def shard(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(24)


@target("safetensors headers", JSON, [HEADER])
def _header(data: bytes, folder: Path) -> object:
    return _shard(shard(data), folder)


@target("safetensors files", BYTES, [shard(json.dumps(HEADER).encode())])
def _shard(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    for tensor in read_header(folder / "model.safetensors").values():
        assert tensor.shard.parent == folder


@target(
    "index files", JSON, [{"metadata": {"total_size": 24}, "weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}]
)
def _index(data: bytes, folder: Path) -> None:
    (folder / "1.safetensors").write_bytes(shard(json.dumps(HEADER).encode()))
    (folder / INDEX).write_bytes(data)
    assert all(tensor.shard.parent == folder for tensor in stored_tensors(folder).values())


CONFIGS = [transformers.AutoConfig.for_model(name, **arch.tiny).to_dict() for name, arch in ARCHS.items()]


@cache
def _weights(family: str) -> bytes:
    """As a file would hold them, all zero."""
    entries, at = {}, 0
    for name, tensor in tiny(family).state_dict().items():
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(at)


@target("model configs", JSON, CONFIGS, cost=10)
def _config(data: bytes, folder: Path) -> object:
    (folder / "config.json").write_bytes(data)
    family = next((name for name in ARCHS if b'"%s"' % name.encode() in data), "llama")
    (folder / "model.safetensors").write_bytes(_weights(family))
    return open_source(folder)


@cache
def _demo_tokenizer() -> transformers.PreTrainedTokenizerBase:
    return load_tokenizer(DEMO_MODEL)


@target(
    "texts", TEXT, ["A river.\n\nAnother one. " * 5, "é" * 50 + "<s></s>", "x" * 400, "a\0b\r\n" * 30, "\u2028 " * 60]
)
def _data(data: bytes, folder: Path) -> object:
    (folder / "text.txt").write_bytes(data)
    corpus = read_text(folder / "text.txt", "\n\n" if len(data) % 2 else None)
    return calibration_windows(corpus, _demo_tokenizer(), Calibration(windows=2, held_out=1, window=8), 16, 2048)


@target("binary files as texts", BYTES, [b"Some text. " * 20, b"\xff\xfe", bytes(100)])
def _binary(data: bytes, folder: Path) -> object:
    return _data(data, folder)


def several(data: bytes, *names: str) -> dict[str, bytes]:
    """Files by name, from a JSON object that holds them; what is none is the first file. A curve is a line a step."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {names[0]: data}
    held = {name: found[name] for name in names if name in found} if isinstance(found, dict) else {}
    lines = {name: value if name == METRICS and isinstance(value, list) else [value] for name, value in held.items()}
    return {name: "\n".join(map(json.dumps, each)).encode() for name, each in lines.items()} or {names[0]: data}


MODEL_FILES = {
    name: json.loads((DEMO_MODEL / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
}
SMALL = {**MODEL_FILES["tokenizer.json"], "model": {**MODEL_FILES["tokenizer.json"]["model"]}}
SMALL["model"]["vocab"] = dict(list(SMALL["model"]["vocab"].items())[:300])
SMALL["model"]["merges"] = SMALL["model"]["merges"][:5]


@target(
    "tokenizers",
    JSON,
    [{"tokenizer.json": SMALL, "tokenizer_config.json": MODEL_FILES["tokenizer_config.json"]}],
    cost=20,
)
def _tokenizer(data: bytes, folder: Path) -> object:
    for name, words in several(data, *MODEL_FILES).items():
        (folder / name).write_bytes(words)
    (folder / "config.json").write_text(json.dumps(CONFIGS[0]))
    return load_tokenizer(folder)


CELL = {"mean": 1.0, "low": 0.5, "high": 1.5}
RUN = {
    RECIPE: json.loads(RECIPES["latmix-lu"]().to_json()),
    SUMMARY: {
        "recipe": "0123456789ab",
        "held_out": {"perplexity": CELL, "kl": CELL, "top1_agreement": CELL},
        "size": {"bytes": 1000, "bits_per_weight": 4.25},
        "float_change_kl": {"before": 0.0, "after": 0.0},
        "maps": {"down": {"condition": 1.0, "logabsdet": 0.0}},
        "errors": {"down/0": {"before": [0.1, 0.1], "after": [0.05, 0.05]}},
        "stages": {"load": {"seconds": 1.0, "peak_bytes": 1000}},
        "kernels": "compiled",
        "model": "m",
        "calibration": {"text": "t", "sha256": "00", "shape": [2, 8]},
        "versions": {"latmix": "0"},
    },
    METRICS: [{"step": 0, "loss": None, "held_out": 1.0}, {"step": 1, "loss": 1.0, "held_out": None}],
}


@target("run directories in a report", JSON, [RUN], cost=3)
def _report(data: bytes, folder: Path) -> object:
    for name, words in several(data, RECIPE, SUMMARY, METRICS).items():
        (folder / name).write_bytes(words)
    seal(folder)
    return report([folder], folder / "report.html")


@target(
    "export manifests",
    JSON,
    [{"version": VERSION, "engines": ["vllm"], "held_out": None}],
)
def _manifest(data: bytes, folder: Path) -> object:
    (folder / MANIFEST).write_bytes(data)
    seal(folder)
    return open_export(folder)


CHECKSUM = hashlib.sha256(b"a").hexdigest()


@target("checksums", TEXT, [f"{CHECKSUM}  a\n", f"{CHECKSUM}  a\n{'0' * 64}  a\n", f"{CHECKSUM}  ../a\n"])
def _checksums(data: bytes, folder: Path) -> object:
    (folder / "a").write_bytes(b"a")
    (folder / SUMS).write_bytes(data)
    return check(folder)


@target("journals", TEXT, [f"{CHECKSUM}  a\n", f"{CHECKSUM}  work/a\n{'0' * 64}  a\n", f"{CHECKSUM}  {'a' * 300}\n"])
def _journal(data: bytes, folder: Path) -> object:
    (folder / "a").write_bytes(b"a")
    (folder / JOURNAL).write_bytes(data)
    return compare_noted(folder)


WHAT = {"model": CHECKSUM, "reference": None, "separator": None, "text": CHECKSUM, "window": 8}


@target("evaluations in the making", BYTES, [json.dumps(WHAT).encode() + b"\n" + bytes(60), b"{}\n", b""])
def _evaluation(data: bytes, folder: Path) -> object:
    (folder / f"result.json{SUFFIX}").write_bytes(data)
    with kept(folder / "result.json") as found:
        found.begin(WHAT, [(1, 7), (1, 7)])
        return found.known
