"""The kernels for GPUs, where there is none: their arithmetic in Triton's interpreter, and what they compile to."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from latmix.numerics import BlockFormat, choose_scales, kernels, parse_format

triton = pytest.importorskip("triton", reason="Triton is not installed")
gpu = pytest.importorskip("latmix.numerics.gpu")

POINTERS = {torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.float32: "*fp32"}


def test_the_laws_hold_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_triton.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed, 1 skipped", done.stdout)  # the one about a GPU
    assert done.returncode == 0 and passed and int(passed[1]) > 100, done.stdout


def test_tensors_on_a_gpu_are_given_these_kernels() -> None:
    with FakeTensorMode():  # has no GPU either
        x = torch.empty(4, 32, device="cuda")
    assert kernels.by_hand([x], parse_format("mxfp4")) is gpu and kernels.on_device([x, torch.empty(1)]) is None
    assert (
        kernels.by_hand([x], parse_format("nvfp4")) is None
        and kernels.by_hand([x.double()], parse_format("mxfp4")) is None
    )


def calls(x: Tensor, fmt: BlockFormat) -> None:
    """All of `gpu`, once."""
    gpu.quantized_values(x, fmt)
    gpu.rotated_values(x, fmt)
    gpu.pack(gpu.codes(x, None, fmt)[0])
    gpu.codes(x, choose_scales(x, fmt)[:, 0], fmt)
    gpu.scale_gradient(x, x, x, fmt)
    wide = x.float()
    gpu.round_columns(wide, wide, wide, wide, wide, fmt)


@pytest.mark.parametrize(
    ("text", "dtype", "capability"),
    [("mxfp4:scale=even", torch.float32, 90), ("mxint4:rounding=away", torch.bfloat16, 100)],
)
def test_they_compile_for_hopper_and_blackwell_to_ieee_arithmetic(
    text: str, dtype: torch.dtype, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machine code, without a GPU: sums and products rounded one by one, subnormal numbers kept, exact division."""
    compiled = []

    def compile(kernel: Any, programs: int, *arguments: Tensor | int | None, warps: int = 4, **constants: Any) -> None:
        constants |= {
            name: a for name, a in zip(kernel.arg_names, arguments, strict=False) if not isinstance(a, Tensor)
        }
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        kinds = {name: POINTERS[a.dtype] for name, a in given.items() if isinstance(a, Tensor)}
        numbers = {"blocks": "i32", "rows": "i32", "count": "i32", "norm": "fp32"}
        kinds |= {name: kind for name, kind in numbers.items() if name in kernel.arg_names}
        signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, {n: constants[n] for n in signature if n not in kinds})
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"enable_fp_fusion": False, "num_warps": warps})
        compiled.append(made.asm["ptx"])
        assert made.asm["cubin"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu, "_run", compile)
    calls(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype), parse_format(text))
    operations = set(re.findall(r"\b((?:fma|mad|add|sub|mul|div)\.\S*f32\S*)", "\n".join(compiled)))
    assert len(compiled) == 7 and operations >= {"add.rn.f32", "div.rn.f32"}
    assert {operation.split(".f32")[0] for operation in operations} <= {"add.rn", "sub.rn", "mul.rn", "div.rn"}
    assert ".ftz" not in "".join(compiled)
