"""Exports in the engines themselves, where their environments exist:

scripts/engines.sh FOLDER && LATMIX_ENGINES=FOLDER pytest tests/test_engines.py
"""

import os
from pathlib import Path

import pytest

import latmix
from latmix import export as exports
from latmix.assets import DEMO_MODEL
from tests.texts import CALIBRATION

SMALL = {"calibration.windows": "8", "calibration.held_out": "2", "calibration.window": "128"}
LEARNED = SMALL | {"learning.steps": "2", "learning.batch": "2"}


@pytest.fixture(scope="module")
def engines() -> Path:
    if "LATMIX_ENGINES" not in os.environ:
        pytest.skip("LATMIX_ENGINES names no folder made by scripts/engines.sh")
    return Path(os.environ["LATMIX_ENGINES"])


@pytest.mark.parametrize(
    ("recipe", "settings", "to", "engine"),
    [
        ("rtn", SMALL, "compressed-tensors", "vllm"),
        ("quarot", SMALL, "compressed-tensors", "vllm"),
        ("latmix-lu", LEARNED | {"target": "compressed-tensors"}, "compressed-tensors", "vllm"),
        (
            "latmix-lu",
            LEARNED | {"target": "compressed-tensors", "online.down": "none"},
            "compressed-tensors",
            "vllm",
        ),
        ("rtn", SMALL, "gguf", "llama"),
        ("latmix-lu", LEARNED | {"target": "gguf"}, "gguf", "llama"),
    ],
)
def test_engine_agrees(
    recipe: str, settings: dict[str, str], to: str, engine: str, engines: Path, tmp_path: Path
) -> None:
    python = engines / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment for {engine} in {engines}")
    latmix.quantize(DEMO_MODEL, tmp_path / "run", recipe, CALIBRATION, 0, settings)
    exports.export(tmp_path / "run", to, tmp_path / "out")
    verdict = exports.verify(tmp_path / "out", engine, str(python))
    assert verdict.passed, verdict
    if engine == "vllm":  # llama.cpp rounds activations differently
        assert verdict.greedy >= 20 and verdict.kl < 1e-3
