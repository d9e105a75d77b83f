"""From a run to a finished folder: check, write, fingerprint, describe, rename.

The folder carries what a later check needs: `latmix.json`, with the SHA-256 of every file it was made of, and
`latmix.fingerprint`, what the run itself answers on a text.
"""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latmix.errors import DamagedError, InputError
from latmix.export import card, fingerprint
from latmix.export.base import EXPORTS
from latmix.export.shards import filling, plan_of
from latmix.export.source import Source, open_run
from latmix.model.shards import is_bare
from latmix.rundir import (
    INPUTS,
    LOCK,
    LOG,
    METRICS,
    RECIPE,
    SUMMARY,
    SUMS,
    TRANSFORMS,
    TUNING,
    digest,
    read_json,
    write_json,
)
from latmix.targets import TARGETS, refuse

MANIFEST, VERSION = "latmix.json", 1
LATER = (MANIFEST, LOCK, card.CARD, card.VERDICT)  # not under checksums: written, or written again, at the end
OURS = (RECIPE, SUMMARY, METRICS, TUNING, TRANSFORMS, INPUTS, LOG, SUMS, "config.json")


def export(run: Path, to: str, out: Path) -> Path:
    """Write `run` in the format `to` into the new folder `out`. A killed export resumes when called again.

    Cost: one tensor in memory while writing; then, for the fingerprint, some two dozen passes over the run with one of
        its layers in memory.
    Raises: LatmixError: unknown target, a run that it cannot express (the reason, and what fits), or a damaged run.
    """
    target, exporter = TARGETS[to], EXPORTS[to]
    source = open_run(run)
    refuse(target, source.layout, source.recipe)
    with filling(out, plan_of(run, to, version("latmix"))) as folder:
        exporter.write(source, folder)
        for file in sorted(run.iterdir()):
            if file.is_file() and file.name not in OURS and not file.name.startswith("quantized"):
                shutil.copyfile(file, folder / file.name)
        fingerprint.take(source, folder)
        write_json(folder / MANIFEST, _manifest(source, to, exporter.engines(source), folder))
        card.write(folder, out)
    return out


def _manifest(source: Source, to: str, engines: tuple[str, ...], folder: Path) -> dict[str, Any]:
    files = sorted(file.name for file in folder.iterdir() if file.name not in LATER)
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
        "files": {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in files},
    }


def _weights(source: Source, path: str) -> int:
    rows, width = source.shapes[f"{path}.weight_packed"]
    return rows * width * 8 // source.layout.weights.element.bits


def _parameters(source: Source) -> int:
    """Of the model before quantization, whose head may have been the embedding."""
    kept = [source.shapes[f"{path}.weight"] for path in (source.arch.embedding, source.arch.head)]
    return sum(rows * width for rows, width in kept) + sum(_weights(source, path) for path in source.linears())


def open_export(folder: Path) -> dict[str, Any]:
    """The manifest of an export whose files are all as they were written.

    Raises: LatmixError: no export, one of another version, or a file missing, cut short or changed.
    """
    if not (folder / MANIFEST).is_file():
        raise InputError(f"'{folder}' is no export of latmix: it has no {MANIFEST}.")
    manifest = read_json(folder / MANIFEST)
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if found != VERSION:
        raise DamagedError(f"The export '{folder}' has version {found}; this latmix reads version {VERSION}.")
    if not isinstance(manifest.get("engines"), list):
        raise DamagedError(f"'{folder / MANIFEST}' is damaged: it names no engines.")
    for name, size, checksum in _files(manifest, folder):
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"The export '{folder}' is incomplete: '{name}' is missing.")
        if file.stat().st_size != size:
            raise DamagedError(f"'{file}' is cut short or changed: {file.stat().st_size} bytes of {size}.")
        if digest(file) != checksum:
            raise DamagedError(f"'{file}' has been changed since the export: its SHA-256 differs from {MANIFEST}.")
    checked: dict[str, Any] = manifest
    return checked


def _files(manifest: dict[str, Any], folder: Path) -> list[tuple[str, Any, Any]]:
    """Name, size and SHA-256 of what is under checksum. Raises: DamagedError: the manifest is not as it was written."""
    try:
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"'{folder / MANIFEST}' is damaged: {error!r}.") from error
    if strange := [name for name, *_ in files if not is_bare(name)]:
        raise DamagedError(f"'{folder / MANIFEST}' names '{strange[0]}', which is no file of the folder.")
    return files


@dataclasses.dataclass(frozen=True)
class Weight:
    """Bytes of the folder's tensor files, and of the original in bfloat16."""

    bytes: int
    bf16_bytes: int


def weight_of(folder: Path, manifest: dict[str, Any]) -> Weight:
    tensors = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf")]
    return Weight(sum(file.stat().st_size for file in tensors), manifest["bf16_bytes"])
