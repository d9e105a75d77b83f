"""Exports in the engines themselves, where their environments exist:

scripts/engines.sh FOLDER && pytest tests/test_engines.py --engines FOLDER   (the servers: tests/test_engines_served.py)
"""

from pathlib import Path

import pytest

import latmix
from latmix import export as exports
from latmix.archs import ARCHS
from latmix.assets import DEMO_MODEL
from tests.exported import with_random_biases
from tests.test_pipeline import save_tiny
from tests.texts import CALIBRATION

SMALL = {"calibration.windows": "8", "calibration.held_out": "2", "calibration.window": "128"}
LEARNED = SMALL | {"calibration.generated": "0", "learning.steps": "2", "learning.batch": "2"}
TUNED = LEARNED | {"tuning.steps": "4", "tuning.batch": "2", "tuning.evaluate_every": "4", "tuning.codes": "false"}
CT = {"target": "compressed-tensors"}
NVFP4 = {"weights": "nvfp4", "activations": "nvfp4:tensor_scale=1"}
MXFP8 = {"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3:scale=rceil"}
OTHERS = [name for name in ARCHS if name != "llama"]
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
        ("latmix-lu", LEARNED | CT | NVFP4 | {"online.down": "none"}, "vllm"),
        ("rtn", SMALL, "llama"),
        ("latmix-lu", LEARNED | {"target": "gguf"}, "llama"),
        ("latmix-plus", TUNED | {"target": "gguf"}, "llama"),
    ],
)
def test_engine_agrees(recipe: str, settings: dict[str, str], engine: str, engines: Path, tmp_path: Path) -> None:
    agrees(DEMO_MODEL, recipe, settings, engine, engines, tmp_path)


@pytest.mark.parametrize(
    ("family", "recipe", "settings", "engine"),
    [
        *((family, "quarot", SMALL | CT, "vllm") for family in OTHERS),
        *((family, "latmix-plus", TUNED | CT | {"online.down": "none"}, "vllm") for family in OTHERS),
        *((family, "latmix-plus", TUNED | {"target": "gguf"}, "llama") for family in OTHERS),
    ],
)
def test_engine_agrees_on_other_families(
    family: str, recipe: str, settings: dict[str, str], engine: str, engines: Path, tmp_path: Path
) -> None:
    """Random weights, gains and biases: the graphs of these families, not only their Llama forms."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256}
    heads = {} if family == "qwen2" else {"head_dim": 32}  # vLLM's CPU attention takes no narrower ones
    model = save_tiny(tmp_path / "model", family, **sizes, **heads)
    agrees(model, recipe, settings, engine, engines, tmp_path)


def agrees(model: Path, recipe: str, settings: dict[str, str], engine: str, engines: Path, folder: Path) -> None:
    python = engines / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment for {engine} in {engines}; scripts/engines.sh makes it")
    latmix.quantize(model, folder / "run", recipe, CALIBRATION, 0, settings)
    with_random_biases(folder / "run", 0.02)
    exports.export(folder / "run", "gguf" if engine == "llama" else "compressed-tensors", folder / "out")
    verdict = exports.verify(folder / "out", engine, str(python))
    assert verdict.passed, verdict
    if engine == "vllm":  # llama.cpp rounds activations differently
        assert verdict.greedy >= 20 and verdict.kl < 1e-3
