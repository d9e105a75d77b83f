"""Exports in the engines themselves, where their environments exist:

scripts/engines.sh FOLDER && pytest tests/test_engines.py --engines FOLDER   (the servers: tests/test_engines_served.py)
"""

from pathlib import Path

import pytest

import latmix
from latmix import export as exports
from latmix.assets import DEMO_MODEL
from tests.exported import with_random_biases
from tests.texts import CALIBRATION

SMALL = {"calibration.windows": "8", "calibration.held_out": "2", "calibration.window": "128"}
LEARNED = SMALL | {"learning.steps": "2", "learning.batch": "2"}
TUNED = SMALL | {"tuning.steps": "4", "tuning.batch": "2", "tuning.evaluate_every": "4", "tuning.codes": "false"}
CT = {"target": "compressed-tensors"}
MXFP8 = {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3:scale=rceil"}
pytestmark = pytest.mark.engines


@pytest.mark.parametrize(
    ("recipe", "settings", "engine"),
    [
        ("rtn", SMALL, "vllm"),
        ("quarot", SMALL, "vllm"),
        ("latmix-lu", LEARNED | CT, "vllm"),
        ("latmix-lu", LEARNED | CT | {"online.down": "none"}, "vllm"),
        ("latmix-plus", TUNED | CT, "vllm"),
        ("block-hadamard", SMALL | {"activations": "none"}, "vllm"),
        ("rtn", SMALL | MXFP8, "vllm"),
        ("rtn", SMALL, "llama"),
        ("latmix-lu", LEARNED | {"target": "gguf"}, "llama"),
        ("latmix-plus", TUNED | {"target": "gguf"}, "llama"),
    ],
)
def test_engine_agrees(recipe: str, settings: dict[str, str], engine: str, engines: Path, tmp_path: Path) -> None:
    python = engines / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment for {engine} in {engines}; scripts/engines.sh makes it")
    latmix.quantize(DEMO_MODEL, tmp_path / "run", recipe, CALIBRATION, 0, settings)
    with_random_biases(tmp_path / "run", 0.02)
    exports.export(tmp_path / "run", "gguf" if engine == "llama" else "compressed-tensors", tmp_path / "out")
    verdict = exports.verify(tmp_path / "out", engine, str(python))
    assert verdict.passed, verdict
    if engine == "vllm":  # llama.cpp rounds activations differently
        assert verdict.greedy >= 20 and verdict.kl < 1e-3
