"""Laws of every transform, at random parameters: an inverse that is right only at the start would be no inverse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latmix.errors import LatmixError
from latmix.transforms import (
    LU,
    QR,
    TRANSFORMS,
    Affine,
    Block,
    Compose,
    Diagonal,
    Hadamard,
    Kronecker,
    Repeat,
    Rotation,
    Transform,
    evaluated_once,
    initial_matrix,
)

START = initial_matrix("random-rotation", 4, seed=1)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(transform: Transform, seed: int = 0) -> Transform:
    """In float64, every parameter moved away from where it starts."""
    transform.double()
    for number, parameter in enumerate(transform.parameters()):
        parameter.data += 0.3 * gaussian(*parameter.shape, seed=seed + number)
    return transform


def registered(name: str) -> Callable[[], Transform]:
    return lambda: TRANSFORMS[name](size=12, init="random-rotation", block=4, seed=3)


def per_head() -> Transform:
    return Block([Affine(LU(START)), Affine(QR(START))])


CASES: dict[str, Callable[[], Transform]] = {name: registered(name) for name in TRANSFORMS}
CASES |= {
    "affine": lambda: Affine(Affine(LU(START))),
    "block": lambda: Block([LU(START), Affine(Diagonal(-torch.ones(3))), Hadamard(5, 4)]),
    "orthogonal block": lambda: Block([Rotation(START), Hadamard(8, signs_seed=1)]),
    "shared block": lambda: Repeat(Affine(QR(START)), repeat=3),
    "alike parts": lambda: Block(
        [*(LU(START) for _ in range(3)), QR(START), QR(START), Rotation(START), Rotation(START)]
    ),
    "grouped queries": lambda: Repeat(per_head(), repeat=3, heads=2),
    "compose": lambda: Compose([Affine(LU(START)), Hadamard(4, signs_seed=0), Affine(QR(START)), Rotation(START)]),
    "orthogonal compose": lambda: Compose([Hadamard(4, signs_seed=0), Affine(Rotation(START))]),
    "orthogonal kronecker": lambda: Kronecker(Hadamard(2), Rotation(START)),
}


@pytest.fixture(params=CASES, ids=str)
def transform(request: pytest.FixtureRequest) -> Transform:
    return randomised(CASES[request.param]())


def test_inverse_undoes_forward(transform: Transform) -> None:
    x = 10 * gaussian(2, 3, transform.size)
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(transform(transform.inverse(x)), x, rtol=0, atol=1e-9)


def test_every_map_agrees_with_the_matrix(transform: Transform) -> None:
    x, a = gaussian(5, transform.size), transform.matrix().detach()
    torch.testing.assert_close(transform.linear(x), x @ a.T)
    torch.testing.assert_close(transform.solve(x), x @ a.inverse().T)
    torch.testing.assert_close(transform.transposed_solve(x), x @ a.inverse())
    torch.testing.assert_close(transform.logabsdet(), torch.linalg.slogdet(a).logabsdet)
    assert transform.condition() == pytest.approx(float(torch.linalg.cond(a)))


def test_blocks_know_nothing_of_each_other(transform: Transform) -> None:
    """As its order has it: the matrix is zero between them, and a part of the map is the block of the matrix."""
    whole, order = transform.matrix(), transform.order
    blocks = torch.zeros_like(whole)
    for start in range(0, transform.size, order):
        some = slice(start, start + order)
        part = transform.part(some)
        blocks[some, some] = part.matrix()
        torch.testing.assert_close(part.shift, None if transform.shift is None else transform.shift[some])
    torch.testing.assert_close(blocks, whole)


def test_the_shift_is_the_image_of_zero(transform: Transform) -> None:
    zero = torch.zeros(transform.size, dtype=torch.float64)
    shift = zero if transform.shift is None else transform.shift
    torch.testing.assert_close(transform(zero), shift)
    has_offset = any(isinstance(module, Affine) for module in transform.modules())
    assert has_offset == (transform.shift is not None) == bool(shift.count_nonzero())


def test_orthogonal_says_no_less_and_no_more(transform: Transform) -> None:
    a = transform.matrix()
    defect = (a.T @ a - torch.eye(transform.size)).abs().max()
    assert transform.orthogonal == bool(defect < 1e-12), f"AᵀA is off by {defect:.1e}"


def test_a_map_born_in_float32_is_exact_in_float64(transform: Transform) -> None:
    x = gaussian(5, transform.size)
    stored = transform.float().double()
    torch.testing.assert_close(stored.inverse(stored(x)), x, rtol=0, atol=1e-9)


def test_gradients(transform: Transform) -> None:
    def maps(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        volume = transform.logabsdet() + x.sum()
        return transform(x), transform.inverse(x), transform.transposed_solve(x), volume

    x = gaussian(1, transform.size, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(maps, (x, *transform.parameters()), fast_mode=True)


def loss_and_gradients(transform: Transform) -> list[Tensor]:
    x = gaussian(5, transform.size, seed=9).requires_grad_()
    loss = (transform(x) ** 3).sum() + transform.inverse(x).sin().sum() + transform.logabsdet() ** 2
    loss.backward()
    gradients = [tensor.grad for tensor in (x, *transform.parameters())]
    transform.zero_grad()
    return [loss.detach(), *(g for g in gradients if g is not None)]


def test_evaluated_once_changes_no_value_and_no_gradient(transform: Transform) -> None:
    expected = loss_and_gradients(transform)
    with evaluated_once(transform):
        actual = loss_and_gradients(transform)
    torch.testing.assert_close(actual, expected)


def counting(build: Callable[..., object], name: str, built: list[tuple[str, int]]) -> Callable[..., object]:
    def counted(*factors: Tensor) -> object:
        built.append((name, len(factors[0])))
        return build(*factors)

    return counted


def test_evaluated_once_builds_once_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = randomised(Block([QR(START), LU(START), LU(START), LU(torch.eye(3))]))
    built: list[tuple[str, int]] = []
    for cls in (QR, LU):
        monkeypatch.setattr(cls, "build", staticmethod(counting(cls.build, cls.__name__, built)))
    before = transform.matrix()
    built.clear()
    with pytest.raises(KeyError), evaluated_once(transform):
        with evaluated_once(transform):
            transform.matrix()
        transform.solve(before)
        assert sorted(built) == [("LU", 1), ("LU", 2), ("QR", 1)]  # maps of one form and size in one batch
        raise KeyError
    for parameter in transform.parameters():
        parameter.data += 0.1
    assert not torch.allclose(transform.matrix(), before)


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_state_dict_carries_the_whole_map(name: str) -> None:
    saved, loaded = (randomised(TRANSFORMS[name](12, "random-rotation", 4, seed), seed) for seed in (3, 4))
    loaded.load_state_dict(saved.state_dict())
    torch.testing.assert_close(loaded.matrix(), saved.matrix(), rtol=0, atol=0)


def test_another_size_is_refused(transform: Transform) -> None:
    for call in (transform, transform.inverse, transform.linear, transform.solve, transform.transposed_solve):
        for size in (1, transform.size - 1, 2 * transform.size):
            with pytest.raises(LatmixError, match=f"of size {transform.size} got"):
                call(gaussian(3, size))


def test_bf16_activations_meet_float32_parameters(transform: Transform) -> None:
    x = gaussian(5, transform.size)
    exact = transform(x)
    actual = transform.float()(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - exact).norm() < 0.02 * exact.norm()
