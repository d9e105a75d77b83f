"""From a run to a finished folder: check, write, fingerprint, describe, rename.

The folder carries what a later check needs: `latmix.json`, what was exported; `latmix.fingerprint`, what the run itself
answers on a text; and `SHA256SUMS`, which lists every file.
"""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latmix.errors import DamagedError, InputError
from latmix.export import card, fingerprint
from latmix.export.base import EXPORTS, MANIFEST, TENSORS
from latmix.export.shards import filling, plan_of
from latmix.export.source import Source, open_run
from latmix.progress import Logged, Progress
from latmix.rundir import (
    INPUTS,
    LOG,
    METRICS,
    RECIPE,
    SUMMARY,
    SUMS,
    TRANSFORMS,
    TUNING,
    partial_of,
    read_json,
    write_json,
    write_text,
    written,
)
from latmix.seal import check
from latmix.targets import TARGETS, refuse

VERSION = 2
OURS = (RECIPE, SUMMARY, METRICS, TUNING, TRANSFORMS, INPUTS, LOG, SUMS, "config.json")


def export(run: Path, to: str, out: Path, progress: Progress | None = None) -> Path:
    """Write `run` in the format `to` into the new folder `out`. A killed export resumes when called again.
    Its log stands beside what it made.

    Cost: one tensor in memory while writing; then, for the fingerprint, some two dozen passes over the run with one of
        its layers in memory.
    Raises: LatmixError: unknown target, a run that it cannot express (the reason, and what fits), or a damaged run.
    """
    target, exporter = TARGETS[to], EXPORTS[to]
    source, told = open_run(run, progress), Logged(progress or Progress(), partial_of(out) / LOG)
    refuse(target, source.layout, source.recipe)
    with filling(out, plan_of(run, to, version("latmix")), told) as folder:
        exporter.write(source, folder, told)
        for file in sorted(run.iterdir()):
            if file.is_file() and file.name not in OURS and not file.name.startswith("quantized"):
                with written(folder / file.name) as temporary:
                    shutil.copyfile(file, temporary)
        fingerprint.take(source, folder, told)
        write_json(folder / MANIFEST, _manifest(source, to, exporter.engines(source)))
        write_text(folder / card.CARD, card.text(folder, out))
    return out


def _manifest(source: Source, to: str, engines: tuple[str, ...]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "latmix": version("latmix"),
        "target": to,
        "engines": list(engines),
        "recipe": json.loads(source.recipe.to_json()),
        "online": dict(source.layout.online),
        "biases": sorted(source.layout.biases),
        "weights": sum(_weights(source, path) for path in source.linears()),
        "bf16_bytes": 2 * _parameters(source),
        "held_out": source.summary["held_out"],
        "calibration": source.summary["calibration"],
        "versions": source.summary["versions"],
    }


def _weights(source: Source, path: str) -> int:
    rows, width = source.shapes[f"{path}.weight_packed"]
    return rows * width * 8 // source.layout.weights.element.bits


def _parameters(source: Source) -> int:
    """Of the model before quantization, whose head may have been the embedding."""
    kept = [source.shapes[f"{path}.weight"] for path in (source.arch.embedding, source.arch.head)]
    return sum(rows * width for rows, width in kept) + sum(_weights(source, path) for path in source.linears())


def open_export(folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """The manifest of an export whose files are all as they were written.

    Cost: one pass over them, of which `progress` is told.

    Raises: LatmixError: no export, one of another version, or a file missing or changed.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"'{folder}' is no export of latmix: it has no {MANIFEST}.")
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if found != VERSION:
        raise DamagedError(f"The export '{folder}' has version {found}; this latmix reads version {VERSION}.")
    if not isinstance(manifest.get("engines"), list):
        raise DamagedError(f"'{folder / MANIFEST}' is damaged: it names no engines.")
    check(folder, progress=progress)
    checked: dict[str, Any] = manifest
    return checked


@dataclasses.dataclass(frozen=True)
class Weight:
    """Bytes of the folder's tensor files, and of the original in bfloat16."""

    bytes: int
    bf16_bytes: int


def weight_of(folder: Path, manifest: dict[str, Any]) -> Weight:
    tensors = [file for file in folder.iterdir() if file.suffix in TENSORS]
    return Weight(sum(file.stat().st_size for file in tensors), manifest["bf16_bytes"])
