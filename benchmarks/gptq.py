"""GPTQ of one Llama-3.2-1B-shaped decoder layer, against llm-compressor and against matrix products of the same size.

    python benchmarks/gptq.py [--linears q_proj,down_proj]

Both get the same float32 weight (normal), the same Hessian (of correlated inputs whose magnitudes span two decades),
MXFP4 scales by the same rule (even), activation order and damping 0.01. llm-compressor's part is `quantize_weight`
under scales that are given; ours chooses scales, rounds and encodes. The loss is that of `proxy_loss`, relative to
rounding to nearest. The last column counts each multiply-add that GPTQ cannot do without, n³/3 + out·n²/2, at the pace
of a float32 matrix product on the same threads.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from latmix.numerics import Quantized, choose_scales, encode, parse_format
from latmix.weights import GPTQ, RTN, proxy_loss

try:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
except ImportError:
    quantize_weight = None

FORMAT = parse_format("mxfp4:scale=even")
LINEARS = {
    "q_proj": (2048, 2048),
    "k_proj": (512, 2048),
    "v_proj": (512, 2048),
    "o_proj": (2048, 2048),
    "gate_proj": (8192, 2048),
    "up_proj": (8192, 2048),
    "down_proj": (2048, 8192),
}


def hessian_of(n: int) -> Tensor:
    """Mean of x xᵀ over 2n tokens, in float32 as calibration takes it."""
    generator = torch.Generator().manual_seed(n)
    gains = torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    common = torch.randn(2 * n, 64, generator=generator).matmul(torch.randn(64, n, generator=generator) / 8)
    x = torch.randn(2 * n, n, generator=generator).add_(common).mul_(gains)
    return x.T.matmul(x).div_(len(x))


def by_llm_compressor(weight: Tensor, hessian: Tensor) -> Tensor:
    settings = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    scheme = QuantizationArgs(**settings, actorder="weight")
    scales = choose_scales(weight, FORMAT)[None]
    stacked = (weight.clone()[None], hessian.clone()[None], scales, torch.zeros_like(scales))
    values, _, fallback = quantize_weight(*stacked, None, scheme)
    assert not fallback.any(), "llm-compressor fell back to rounding"
    return values[0]


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def multiply_adds_per_second() -> float:
    a = torch.randn(2048, 2048)
    return 2048**3 / min(seconds(lambda: a.matmul(a))[0] for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--linears", default=",".join(LINEARS))
    names = parser.parse_args().linears.split(",")

    GPTQ()(torch.randn(512, 512), torch.eye(512), FORMAT)  # compiles
    pace, hessians = (
        multiply_adds_per_second(),
        {n: hessian_of(n) for n in sorted({LINEARS[name][1] for name in names})},
    )
    total = torch.zeros(3)
    print("| linear | out × n | latmix, s | llm-compressor, s | ratio | loss / rounding | theirs | same size, s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        out, n = LINEARS[name]
        weight = torch.randn(out, n, generator=torch.Generator().manual_seed(1)) * 0.02
        ours, quantized = seconds(lambda: GPTQ()(weight, hessians[n], FORMAT))  # noqa: B023
        assert isinstance(quantized, Quantized)
        rounded = proxy_loss(weight, RTN()(weight, None, FORMAT), hessians[n])
        loss, product = proxy_loss(weight, quantized, hessians[n]) / rounded, (n**3 / 3 + out * n**2 / 2) / pace
        theirs, their_loss = float("nan"), "not installed"
        if quantize_weight is not None:
            theirs, values = seconds(lambda: by_llm_compressor(weight, hessians[n]))  # noqa: B023
            stored = encode(values, FORMAT, choose_scales(weight, FORMAT))  # what they would store
            their_loss = f"{proxy_loss(weight, stored, hessians[n]) / rounded:.4f}"
        row = f"{ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {loss:.4f} | {their_loss} | {product:.2f}"
        print(f"| {name} | {out} × {n} | {row} |", flush=True)
        total += torch.tensor([ours, theirs, product])
    ours, theirs, product = total.tolist()
    print(f"| all | | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | | | {product:.2f} |")


if __name__ == "__main__":
    main()
