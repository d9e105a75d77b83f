"""The same code on a GPU: bit-equal numerics, and a run from end to end."""

from pathlib import Path

import pytest
import torch

import latmix
from latmix.numerics import FORMATS
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION, OTHER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("format", FORMATS.names())
def test_codes_and_scales_equal_the_cpu_s(format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 172, generator=generator) * torch.randint(-20, 20, (64, 172), generator=generator).exp2()
    on_cpu, on_gpu = latmix.encode(x, format), latmix.encode(x.cuda(), format)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
    assert torch.equal(on_gpu.scales.cpu(), on_cpu.scales)


@pytest.mark.parametrize("recipe", ["latmix-lu", "latmix-plus"])
def test_a_run_on_the_gpu(recipe: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    run = latmix.quantize(model, tmp_path / "run", recipe, CALIBRATION, 0, settings(recipe))
    assert run.summary["stages"]["learn"]["peak_device_bytes"] > 0
    result = latmix.evaluate(run.path, OTHER, reference=model)
    assert result.kl is not None and result.kl.mean > 0
