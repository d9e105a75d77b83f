"""MXFP4 fake quantization, with a Hadamard rotation before it, and encoding, of a 4096 × 4096 tensor on a CPU.

    python benchmarks/kernels.py [--rounds 7]

Against torchao and compressed-tensors, where they are installed, and against copies of the same bytes: into memory
fresh from the system (`clone`), as all of these have their results, and into memory that is there (`copy_`). Rounds
alternate; the best of each is reported, in milliseconds.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from latmix.numerics import encode, fake_quant, kernels, pack, parse_format, rotated_fake_quant

FORMAT = parse_format("mxfp4:scale=even")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds

    columns = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
            best = dict.fromkeys(found := contenders(x), float("inf"))
            for _ in range(rounds):
                for name, run in found.items():
                    began = time.perf_counter()
                    run()
                    best[name] = min(best[name], 1000 * (time.perf_counter() - began))
            columns[dtype] = best
    print(f"kernels: {kernels.status()}; {torch.get_num_threads()} threads")
    print("| | float32, ms | of clone's speed | bfloat16, ms | of clone's speed |\n|---|---|---|---|---|")
    for name in columns[torch.float32]:
        cells = [f"{best[name]:.1f} | {best['clone'] / best[name]:.2f}" for best in columns.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
