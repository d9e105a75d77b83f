"""Compiled kernels are held to the reference, bit for bit where nothing is summed."""

import pytest
import torch

from latmix.numerics import fake_quant, kernels, parse_format
from latmix.numerics.fakequant import quantized_values, scale_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("text", ["mxfp4:scale=even", "mxint4", "nvfp4", "mxfp8_e4m3:block=16,rounding=away"])
def test_the_kernel_is_bit_equal_to_the_reference(text: str, dtype: torch.dtype) -> None:
    fmt = parse_format(text)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 340, 172, generator=generator) * 2.0 ** torch.randint(
        -140, 127, (3, 340, 1), generator=generator
    )
    x[0, 0, :6] = torch.tensor([0.0, -0.0, 2.0**-149, 3.4e38, -3.4e38, 1.75])
    x[0, 1], x[0, 2, 5], x[0, 3, 40] = 0.0, torch.nan, -torch.inf
    if fmt.scale_element == "e4m3":
        x = x.nan_to_num(0.0, 0.0, 0.0).clamp(-1e30, 1e30)
    x = x.to(dtype)
    assert x.numel() >= kernels.LARGE
    by_kernel, by_reference = quantized_values(x, fmt), quantized_values.reference(x, fmt)  # type: ignore[attr-defined]
    assert kernels.status() == "compiled"
    assert torch.equal(by_kernel.isnan(), by_reference.isnan())
    numbers = ~by_reference.isnan()
    assert torch.equal(by_kernel[numbers], by_reference[numbers])
    assert torch.equal(by_kernel[numbers].signbit(), by_reference[numbers].signbit())


def test_the_gradient_kernel_differs_from_its_reference_by_the_order_of_a_sum() -> None:
    fmt = parse_format("mxfp4:scale=even")
    x, g = torch.randn(700, 172), torch.randn(700, 172)
    q = fake_quant(x, fmt)
    expected = scale_gradient.reference(g, x, q, fmt)  # type: ignore[attr-defined]
    torch.testing.assert_close(scale_gradient(g, x, q, fmt), expected, rtol=0, atol=1e-5)
