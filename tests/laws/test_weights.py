"""Laws of every weight quantizer, and GPTQ against its textbook form, on Hessians with correlated and uneven inputs."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from latmix import compiled
from latmix.errors import LatmixError
from latmix.numerics import (
    FORMATS,
    BlockFormat,
    Quantized,
    choose_scales,
    decode,
    decode_scales,
    encode,
    parse_format,
    round_columns,
)
from latmix.numerics.columns import one_by_one
from latmix.stages import Stages
from latmix.weights import GPTAQ, GPTQ, RTN, WEIGHT_QUANTIZERS, WeightQuantizer, parse_quantizer, proxy_loss
from latmix.weights.gptq import _factor, mean_diagonal

QUANTIZERS = [WEIGHT_QUANTIZERS[name]() for name in WEIGHT_QUANTIZERS] + [GPTQ(act_order=False, columns=5)]
VARIANTS = ["mxfp4:scale=even", "mxfp4:scale=search", "mxint4:scale=search,block=16", "nvfp4:scale=search"]
FORMAT_LIST = [parse_format(text) for text in [*FORMATS, *VARIANTS]]
MXFP4 = FORMATS["mxfp4"]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(n: int, count: int | None = None) -> Tensor:
    """Correlated channels whose magnitudes span two decades."""
    gains = torch.logspace(-1, 1, n, dtype=torch.float64)[gaussian(n, seed=1).argsort()]
    mixing = torch.eye(n) + gaussian(n, n, seed=3) / n**0.5
    return torch.matmul(gaussian(count or 2 * n, n, seed=2), mixing * gains)


def hessian_of(n: int, count: int | None = None) -> Tensor:
    x = tokens(n, count)
    return torch.matmul(x.T, x / len(x))


def same(a: Quantized, b: Quantized) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


def textbook(weight: Tensor, hessian: Tensor, scales: Tensor, fmt: BlockFormat, quantizer: GPTQ) -> Tensor:
    """Frantar et al. (2210.17323), algorithm 1, without blocks: the Cholesky factor of the inverse, updated weights."""
    n = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True) if quantizer.act_order else torch.arange(n)
    hessian = hessian + quantizer.damping * hessian.diagonal().mean() * torch.eye(n)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    grid = torch.tensor([*(-v for v in fmt.element.grid), *fmt.element.grid], dtype=torch.float64)
    weight, quantized = weight[:, order].clone(), torch.zeros_like(weight)
    for i, column in enumerate(order.tolist()):
        scale = scales[:, column // fmt.block]
        nearest = ((weight[:, i] / scale)[:, None] - grid).abs().argmin(1)
        quantized[:, column] = grid[nearest] * scale
        error = (weight[:, i] - quantized[:, column]) / factor[i, i]
        weight[:, i:] -= torch.outer(error, factor[i, i:])
    return quantized


@pytest.mark.parametrize("columns", [7, 128])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=str)
def test_gptq_is_the_textbook_algorithm(fmt: BlockFormat, act_order: bool, columns: int) -> None:
    weight, hessian, quantizer = gaussian(24, 76), hessian_of(76), GPTQ(act_order, columns=columns)
    quantized = quantizer(weight, hessian, fmt)
    scales = decode_scales(quantized.scales, fmt, quantized.tensor_scale, torch.float64)
    assert torch.equal(decode(quantized), textbook(weight, hessian, scales, fmt, quantizer))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=str)
def test_gptq_loses_less_than_rounding(fmt: BlockFormat, act_order: bool) -> None:
    weight, hessian = gaussian(48, 172).float(), hessian_of(172).float()
    rounded = proxy_loss(weight, RTN()(weight, None, fmt), hessian)
    assert proxy_loss(weight, GPTQ(act_order)(weight, hessian, fmt), hessian) < 0.7 * rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_codes_are_of_the_format(quantizer: WeightQuantizer, fmt: BlockFormat, dtype: torch.dtype) -> None:
    weight = gaussian(6, 76).to(dtype)
    quantized = quantizer(weight, hessian_of(76), fmt, None, hessian_of(76))
    assert quantized.codes.shape == weight.shape and quantized.format == fmt
    assert quantized.scales.shape == (6, -(-76 // fmt.block))
    assert decode(quantized).dtype == dtype and decode(quantized).isfinite().all()
    wide = decode(dataclasses.replace(quantized, dtype=torch.float64))
    scales = decode_scales(quantized.scales, fmt, quantized.tensor_scale, torch.float64)
    assert same(encode(wide, fmt, scales, quantized.tensor_scale), quantized)


@pytest.mark.parametrize("fmt", [MXFP4, FORMATS["mxint8"]], ids=str)
@pytest.mark.parametrize("quantizer", [each for each in QUANTIZERS if not each.needs_cross], ids=str)
def test_what_is_on_the_grid_stays(quantizer: WeightQuantizer, fmt: BlockFormat) -> None:
    first = encode(gaussian(8, 76), fmt)
    again = quantizer(decode(first), hessian_of(76), fmt)
    assert torch.equal(decode(again), decode(first)) and torch.equal(again.scales, first.scales)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_rows_are_independent_and_runs_repeat(quantizer: WeightQuantizer) -> None:
    weight, hessian, order = gaussian(16, 172), hessian_of(172), gaussian(16, seed=4).argsort()
    quantized = quantizer(weight, hessian, MXFP4, None, hessian)
    assert same(quantizer(weight, hessian, MXFP4, None, hessian), quantized)
    assert torch.equal(quantizer(weight[order], hessian, MXFP4, None, hessian).codes, quantized.codes[order])


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=str)
def test_scales_are_those_of_the_original_weight(fmt: BlockFormat) -> None:
    weight, hessian = gaussian(8, 172).float(), hessian_of(172).float()
    expected = choose_scales(weight, fmt, hessian.diagonal() + 0.01 * hessian.diagonal().mean())
    quantized = GPTQ()(weight, hessian, fmt)
    assert torch.equal(decode_scales(quantized.scales, fmt, quantized.tensor_scale), expected)


@pytest.mark.parametrize("fmt", [*FORMATS, "mxfp4:rounding=away"])
def test_uncorrelated_inputs_leave_nothing_to_compensate(fmt: str) -> None:
    weight, hessian = (8 * gaussian(8, 76)).round().add(0.0) / 8, hessian_of(76).diagonal().diag()  # many are ties
    for quantizer in (GPTQ(), GPTQ(act_order=False)):
        assert same(quantizer(weight, hessian, parse_format(fmt)), RTN()(weight, None, parse_format(fmt)))


@pytest.mark.parametrize("fmt", FORMAT_LIST, ids=str)
def test_the_kernel_rounds_a_panel_as_one_column_after_another_does(fmt: BlockFormat) -> None:
    """The same values, but where sums in another order end on two sides of a tie: not seen on these numbers."""
    columns, out = 40, 150
    weight, feedback = gaussian(columns, out).float(), gaussian(columns, columns, seed=1).float() / 8
    scales = choose_scales(weight.t(), fmt).repeat_interleave(fmt.block, 1)[:, :columns].t().contiguous()
    values, error, expected, expected_error = weight.clone(), weight.clone(), weight.clone(), weight.clone()
    round_columns(values, weight + 0.1, feedback, scales, error, fmt)
    one_by_one(expected, weight + 0.1, feedback, scales, expected_error, fmt)
    assert "C++" in compiled.status() and torch.equal(values, expected) and torch.equal(error, expected_error)
    torch.testing.assert_close(weight - values, error)


def test_bfloat16_is_quantized_as_its_float32_copy_and_units_do_not_matter() -> None:
    weight, hessian = gaussian(8, 76).bfloat16(), hessian_of(76)
    assert same(GPTQ()(weight, hessian, MXFP4), GPTQ()(weight.float(), hessian / 2**40, MXFP4))


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_are_rounded(act_order: bool) -> None:
    weight, hessian, dead = gaussian(8, 76).float(), hessian_of(76), torch.tensor([0, 30, 75])
    hessian[dead], hessian[:, dead] = 0, 0
    rounded, codes = RTN()(weight, None, MXFP4), GPTQ(act_order)(weight, hessian, MXFP4).codes
    assert torch.equal(codes[:, dead], rounded.codes[:, dead]) and not torch.equal(codes, rounded.codes)
    assert same(GPTQ(act_order)(weight, torch.zeros(76, 76), MXFP4), rounded)


def test_fewer_tokens_than_inputs() -> None:
    weight, hessian = gaussian(16, 76).float(), hessian_of(76, count=20).float()
    rounded = proxy_loss(weight, RTN()(weight, None, MXFP4), hessian)
    assert proxy_loss(weight, GPTQ()(weight, hessian, MXFP4), hessian) < 0.3 * rounded


def test_brute_force() -> None:
    """Babai's bound holds, no codes beat the optimum, and GPTQ goes nine tenths of the way from rounding to there."""
    fmt, weight, hessian = parse_format("mxint4:block=4,scale=ceil"), gaussian(64, 4), hessian_of(4, count=8)
    rounded, quantized = RTN()(weight, None, fmt), GPTQ(damping=1e-12)(weight, hessian, fmt)
    steps = decode_scales(quantized.scales, fmt, dtype=torch.float64) * fmt.element.smallest
    grid = torch.tensor(list(itertools.product(range(-7, 8), repeat=4)), dtype=torch.float64)
    errors = weight[:, None] - grid * steps[:, None]
    best = float(((errors @ hessian) * errors).sum(-1).amin(1).mean())
    order = hessian.diagonal().argsort(descending=True)
    pivots = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True).diagonal() ** -2
    loss = proxy_loss(weight, quantized, hessian)
    assert best <= loss <= float((steps**2 / 4 * pivots.sum()).mean())
    assert loss - best < 0.1 * (proxy_loss(weight, rounded, hessian) - best)


def test_proxy_loss_is_the_output_error_over_the_tokens() -> None:
    weight, x = gaussian(8, 76), tokens(76)
    quantized = RTN()(weight, None, MXFP4)
    expected = float(((weight - decode(quantized)) @ x.T).square().mean())
    assert proxy_loss(weight, quantized, x.T @ x / len(x)) == pytest.approx(expected, rel=1e-12)


def test_an_indefinite_hessian_is_damped_aloud() -> None:
    weight, hessian = gaussian(8, 76), hessian_of(76)
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(76)
    with pytest.warns(UserWarning, match="needed damping 0.1"):
        quantized = GPTQ()(weight, hessian, MXFP4)
    assert same(quantized, GPTQ(damping=0.1)(weight, hessian, MXFP4))


def originals(x: Tensor) -> Tensor:
    """What x is a noisy and shrunk copy of."""
    return 1.1 * x + gaussian(*x.shape, seed=5)


def test_gptaq_with_the_originals_inputs_is_gptq() -> None:
    weight, hessian = gaussian(16, 76), hessian_of(76)
    assert same(GPTAQ()(weight, hessian, MXFP4, None, hessian), GPTQ()(weight, hessian, MXFP4))


def test_gptaq_aims_at_the_weight_whose_outputs_are_nearest_to_the_originals() -> None:
    weight, x = gaussian(8, 76), tokens(76, 400)
    y, hessian = originals(x), torch.matmul(x.T, x / len(x))
    quantizer = GPTAQ(damping=0.02)
    aimed = quantizer.aimed(weight, hessian, torch.matmul(y.T, x / len(x))).requires_grad_()
    away = (torch.matmul(x, aimed.T) - torch.matmul(y, weight.T)).square().sum() / len(x)
    pulled = away + 0.02 * hessian.diagonal().mean() * (aimed - weight).square().sum()
    (gradient,) = torch.autograd.grad(pulled, aimed)
    assert gradient.abs().max() < 1e-9 * hessian.abs().max()


def test_gptaq_is_nearer_to_the_originals_outputs() -> None:
    weight, x = gaussian(16, 76), tokens(76, 400)
    y, hessian = originals(x), torch.matmul(x.T, x / len(x))

    def away(quantized: Quantized) -> float:
        return float((torch.matmul(x, decode(quantized).T) - torch.matmul(y, weight.T)).square().sum())

    aimed = GPTAQ()(weight, hessian, MXFP4, None, torch.matmul(y.T, x / len(x)))
    assert away(aimed) < 0.8 * away(GPTQ()(weight, hessian, MXFP4))


def test_refusals() -> None:
    weight, hessian = gaussian(8, 76), hessian_of(76)
    spoiled, hole = hessian.clone().fill_diagonal_(torch.nan), weight.clone().fill_diagonal_(torch.inf)
    for bad_weight, bad_hessian, message in (
        (weight, None, "needs the Hessian"),
        (weight, spoiled, "Hessian holds NaN"),
        (hole, hessian, "weight holds NaN"),
        (weight, -hessian, "not positive definite"),
    ):
        with pytest.raises(LatmixError, match=message):
            GPTQ()(bad_weight, bad_hessian, MXFP4)
    with pytest.raises((LatmixError, TypeCheckError)):  # the import hook sees the shapes first
        GPTQ()(weight, hessian[1:, 1:], MXFP4)
    with pytest.raises(LatmixError, match="gptaq needs the Hessian of the weight's inputs and the cross moment"):
        GPTAQ()(weight, hessian, MXFP4)
    with pytest.raises(LatmixError, match="gptaq: the cross moment holds NaN"):
        GPTAQ()(weight, hessian, MXFP4, None, spoiled)


def test_quantizers_are_read_from_text() -> None:
    assert parse_quantizer("rtn") == RTN() and parse_quantizer("gptq") == GPTQ()
    assert parse_quantizer("gptq:damping=0.05,act_order=false,columns=64") == GPTQ(False, 0.05, columns=64)
    for text, message in (
        ("awq", "known: gptq, gptaq, rtn"),
        ("gptq:block=3", "unknown setting 'block'; known: act_order, damping, search, columns"),
        ("rtn:damping=1", "known: none"),
        ("gptq:act_order=1", "true or false"),
        ("gptq:columns=0", "positive integer"),
        ("gptq:columns=half", "must be an integer"),
        ("gptq:damping=little", "must be a number"),
        ("gptq:damping=nan", "above 0"),
    ):
        with pytest.raises(LatmixError, match=message):
            parse_quantizer(text)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no high-water mark that can be reset")
def test_the_factor_is_taken_where_its_matrix_stands() -> None:
    """Eight bytes a number beside the Hessian, and room for the library to work in."""
    n, order = 2048, torch.arange(2048)
    hessian, stages = torch.eye(n) + 0.01, Stages()
    small = torch.eye(256)
    _factor(small, order[:256], 0.01)
    with stages.stage("before"):
        pass
    with stages.stage("factor"):
        factor = _factor(hessian, order, 0.01)
    wanted = hessian.double() + 0.01 * mean_diagonal(hessian.diagonal()) * torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(factor.tril() @ factor.tril().T, wanted)
    assert stages.costs["factor"]["peak_bytes"] - stages.costs["before"]["peak_bytes"] < 1.4 * 8 * n**2
