"""MXFP4, MXFP8 and NVFP4 on vLLM's CPU platform, which has no kernels for them: a stand-in for what accelerators do.

For tests only; no product of ours is needed to serve a checkpoint on a GPU. It shares no code with latmix, so that it
checks latmix's reading of the format: codes and scales are decoded at load, activations rounded as vLLM's own emulation
does (MXFP4: blocks of 32, scale rule EVEN, ties to even; MXFP8: RCEIL; NVFP4: blocks of 16 under a tensor-wide scale),
or left alone under `--linear-backend marlin`, vLLM's kernels for 16-bit activations. The last part replaces an
operation that exists for CUDA only.
"""

import torch
from torch.nn import functional as F

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decoded(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2).long()
    return table[codes] * torch.exp2(scale.float() - 127.0).repeat_interleave(32, dim=-1)


def decoded_nv(packed: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2).long()
    return table[codes] * (scale.float() * tensor_scale).repeat_interleave(16, dim=-1)


def decoded8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return weight.float() * torch.exp2(scale.float() - 127.0).repeat_interleave(32, dim=-1)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Quantize and dequantize in blocks of 32."""
    blocks = x.float().unflatten(-1, (-1, 32))
    peak = blocks.abs().amax(-1, keepdim=True)
    # EVEN: the peak is rounded to E2M1's one mantissa bit before its exponent is taken.
    bits = (peak.view(torch.int32) + (1 << 21)) & 0x7F800000
    exponent = ((bits >> 23) - 127 - 2).clamp(-127, 127)
    return on_grid(blocks, torch.exp2(exponent.float())).flatten(-2).to(x.dtype)


def on_grid(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """To E2M1 under these scales, ties to even."""
    scaled = blocks / scale
    magnitude = scaled.abs().clamp(max=6.0)
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return (magnitude / step).round() * step * scaled.sign() * scale


def rounded_nv(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """In blocks of 16 under E4M3 scales, `inverse` that of the tensor-wide one. A scale of 0 makes a block 0."""
    blocks = x.float().unflatten(-1, (-1, 16))
    peak = blocks.abs().amax(-1, keepdim=True)
    scale = (inverse * (peak / 6.0)).clamp(max=448.0).to(torch.float8_e4m3fn).float() / inverse
    return torch.where(scale == 0, 0.0, on_grid(blocks, scale)).flatten(-2).to(x.dtype)


def rounded8(x: torch.Tensor) -> torch.Tensor:
    """The same to E4M3 under RCEIL: the smallest power of two under which nothing exceeds 448."""
    blocks = x.float().unflatten(-1, (-1, 32))
    peak = blocks.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.ceil(torch.log2(peak / 448.0)).clamp(-127, 127))
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def hadamard(x: torch.Tensor, inplace: bool = True) -> torch.Tensor:
    matrix, size = torch.ones(1, 1), x.shape[-1]
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ (matrix / size**0.5).to(x.dtype)


def register() -> None:
    import vllm._custom_ops as ops
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel
    from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel
    from vllm.platforms import PlatformEnum

    def emulation(base: type, decode: object, round_: object) -> type:
        def process(self: object, layer: torch.nn.Module) -> None:
            weight = decode(layer.weight.data, layer.weight_scale.data)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.rounds = get_current_vllm_config().kernel_config.linear_backend != "marlin"

        def apply(
            self: object, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            x = round_(x) if self.rounds else x
            return F.linear(x, layer.weight.to(x.dtype), bias)

        yes = classmethod(lambda cls, what=None: (True, None))
        members = {"is_supported": yes, "can_implement": yes, "apply_weights": apply}
        return type(f"Cpu{base.__name__}", (base,), members | {"process_weights_after_loading": process})

    class CpuNvFp4LinearKernel(NvFp4LinearKernel):
        """Rounds always: weights alone take other kernels, none of which is asked for on a CPU."""

        is_supported = can_implement = classmethod(lambda cls, what=None: (True, None))

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            weight = decoded_nv(layer.weight.data, layer.weight_scale.data, layer.weight_global_scale)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            return F.linear(rounded_nv(x, layer.input_global_scale_inv), layer.weight.to(x.dtype), bias)

    register_linear_kernel(CpuNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    register_linear_kernel(emulation(MxFp4LinearKernel, decoded, rounded), PlatformEnum.CPU, "mxfp4")
    register_linear_kernel(emulation(Mxfp8LinearKernel, decoded8, rounded8), PlatformEnum.CPU, "mxfp8")
    ops.hadacore_transform = hadamard
