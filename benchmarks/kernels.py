"""MXFP4 fake quantization, with a Hadamard rotation before it, and encoding: 4096 × 4096 on a CPU, 8192 × 8192 on GPUs.

    python benchmarks/kernels.py [--rounds 7]

Against torchao and compressed-tensors, where they are installed, and against copies of the same bytes: into memory
fresh from the system (`clone`), as all of these have their results, and into memory that is there (`copy_`). Rounds
alternate; the best of each is reported, in milliseconds. On a GPU, if there is one, a round is twenty calls, and what
is reported is bandwidth, of the bytes that have to be read and written.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from latmix import compiled
from latmix.numerics import encode, fake_quant, pack, parse_format, rotated_fake_quant

FORMAT = parse_format("mxfp4:scale=even")
DTYPES = (torch.float32, torch.bfloat16)


def contenders(x: Tensor) -> dict[str, Callable[[], object]]:
    there = torch.empty_like(x)
    found: dict[str, Callable[[], object]] = {
        "fake quantization": lambda: fake_quant(x, FORMAT),
        "Hadamard + fake quantization": lambda: rotated_fake_quant(x, FORMAT),
        "encode + pack": lambda: pack(encode(x, FORMAT).codes, 4),
        "clone": lambda: x.clone(),
        "copy_": lambda: there.copy_(x),
    }
    try:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

        def by_torchao() -> MXTensor:
            return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)

        found["torchao, encode + pack"] = by_torchao
        found["torchao, fake quantization"] = lambda: by_torchao().dequantize(x.dtype)
    except ImportError:
        print("torchao: not installed")
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize
        from torch import nn

        settings = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
        scheme = QuantizationArgs(**settings, dynamic=True, scale_dtype=torch.uint8)
        place = nn.Module()
        place.quantization_enabled, place.quantization_status = True, QuantizationStatus.FROZEN
        found["compressed-tensors, fake quantization"] = lambda: forward_quantize(place, x, "input", scheme)
    except ImportError:
        print("compressed-tensors: not installed")
    return found


def best_times(x: Tensor, rounds: int) -> dict[str, float]:
    best = dict.fromkeys(found := contenders(x), float("inf"))
    for _ in range(rounds):
        for name, run in found.items():
            best[name] = min(best[name], gpu_time(run) if x.is_cuda else cpu_time(run))
    return best


def cpu_time(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def gpu_time(run: Callable[[], object], calls: int = 20) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # compiles, the first time
    began.record()
    for _ in range(calls):
        run()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / calls


def input(size: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def measure_cpu(rounds: int) -> None:
    columns = [best_times(input(4096, dtype, "cpu"), rounds) for dtype in DTYPES]
    print(f"CPU: {compiled.status()}; {torch.get_num_threads()} threads")
    print("| | float32, ms | of clone's speed | bfloat16, ms | of clone's speed |\n|---|---|---|---|---|")
    for name in columns[0]:
        cells = [f"{best[name]:.1f} | {best['clone'] / best[name]:.2f}" for best in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def measure_gpu(rounds: int) -> None:
    if not torch.cuda.is_available():
        print("GPU: not measured: no GPU")
        return
    columns = []
    for dtype in DTYPES:
        x = input(8192, dtype, "cuda")
        codes = x.numel() // 2 + x.numel() // FORMAT.block
        rates = {
            name: (x.nbytes + (codes if "encode" in name else x.nbytes)) / milliseconds / 1e6
            for name, milliseconds in best_times(x, rounds).items()
        }
        columns.append(rates)
    print(f"GPU: {compiled.status()}; {torch.cuda.get_device_name()}")
    print("| | float32, GB/s | of copy_'s bandwidth | bfloat16, GB/s | of copy_'s bandwidth |\n|---|---|---|---|---|")
    for name in columns[0]:
        cells = [f"{rates[name]:.0f} | {rates[name] / rates['copy_']:.2f}" for rates in columns]
        print(f"| {name} | {' | '.join(cells)} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measure_cpu(rounds)
    measure_gpu(rounds)


if __name__ == "__main__":
    main()
