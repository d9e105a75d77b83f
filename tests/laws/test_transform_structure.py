"""What each transform is, written out as a matrix; and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latmix import compiled
from latmix.errors import LatmixError
from latmix.transforms import (
    INITIALS,
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
    initial_matrix,
)
from latmix.transforms.hadamard import butterflies, joined, sylvester
from latmix.transforms.rotation import exponential


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def affine(size: int, seed: int) -> Affine:
    transform = Affine(LU(gaussian(size, size, seed=seed)))
    transform.offset.data = gaussian(size, seed=seed + 1)
    return transform


@pytest.mark.parametrize("name", INITIALS.names())
@pytest.mark.parametrize("size", [64, 96, 172])
def test_initial_matrices_are_orthogonal_in_float64(name: str, size: int) -> None:
    a = initial_matrix(name, size, block=32, seed=5)
    torch.testing.assert_close(a.T @ a, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


def test_random_rotations_lean_to_no_side() -> None:
    positive = (initial_matrix("random-rotation", 200, seed=0).diagonal() > 0).double().mean()
    assert 0.4 < positive < 0.6  # a plain QR factorisation has nearly none


@pytest.mark.parametrize("name", ["rotation", "lu", "qr"])
@pytest.mark.parametrize("init", INITIALS.names())
def test_learned_maps_start_at_their_initial_matrix(name: str, init: str) -> None:
    transform = TRANSFORMS[name](size=44, init=init, block=32, seed=5)
    assert {parameter.dtype for parameter in transform.parameters()} == {torch.float32}
    expected = initial_matrix(init, 44, block=32, seed=5)
    torch.testing.assert_close(transform.matrix().double(), expected, rtol=0, atol=1e-6)


def test_factorisations_reproduce_any_invertible_matrix() -> None:
    a = gaussian(16, 16)
    for transform in (LU(a), QR(a)):
        torch.testing.assert_close(transform.matrix(), a)
        torch.testing.assert_close(transform.solve(a.T), torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(Rotation(initial_matrix("hadamard", 16)).matrix(), initial_matrix("hadamard", 16))
    torch.testing.assert_close(Diagonal(a[0]).matrix(), a[0].diag())


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 40.0])
def test_exponential_agrees_with_torch(norm: float) -> None:
    g = gaussian(20, 20)
    s = norm * (g - g.T) / torch.linalg.matrix_norm(g - g.T, 2)
    torch.testing.assert_close(exponential(s), torch.linalg.matrix_exp(s), rtol=0, atol=1e-13)
    single = exponential(s.float()).double()
    torch.testing.assert_close(single, torch.linalg.matrix_exp(s), rtol=0, atol=1e-5 * (1 + norm))


def textbook_hadamard(order: int) -> Tensor:
    """Entry (i, j) is (−1)^(number of ones that i and j share in binary)."""
    entries = [[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    return torch.tensor(entries, dtype=torch.float64) / order**0.5


@pytest.mark.parametrize(
    ("size", "block", "orders"),
    [
        (172, None, [4] * 43),
        (64, None, [64]),
        (96, None, [32] * 3),
        (128, None, [128]),
        (512, None, [512]),
        (172, 32, [32] * 5 + [8, 4]),
        (64, 32, [32, 32]),
        (12, 32, [8, 4]),
        (7, 2, [2, 2, 2, 1]),
        (256, 256, [256]),
    ],
)
@pytest.mark.parametrize("signs_seed", [None, 0])
def test_hadamard_is_the_textbook_matrix(size: int, block: int | None, orders: list[int], signs_seed: int) -> None:
    transform = Hadamard(size, block, signs_seed).double()
    expected = torch.block_diag(*map(textbook_hadamard, orders))
    if transform.signs is not None:
        assert set(transform.signs.tolist()) == {-1.0, 1.0}
        expected = expected * transform.signs
    torch.testing.assert_close(transform.matrix(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", [2, 16, 32, 64, 2048])
def test_butterflies_are_the_product(order: int) -> None:
    """On either side of a weight; with a gradient the product itself computes."""
    transform, weight = Hadamard(4096, order, signs_seed=1).double(), gaussian(8, 4096)
    for x in (weight, gaussian(4096, 8).T, weight[:, None, :]):
        product = transform.linear(x.clone().requires_grad_())
        torch.testing.assert_close(transform.linear(x), product.detach(), rtol=1e-13, atol=1e-13)
    assert "C++" in compiled.status()
    turned = butterflies(gaussian(4096, 8).T.unflatten(-1, (-1, order)))
    assert turned.flatten(-2).T.is_contiguous()


def test_a_hadamard_matrix_first_made_where_tensors_have_no_numbers_has_some_elsewhere() -> None:
    sylvester.cache_clear()
    with torch.device("meta"):
        Hadamard(64, 32)
    assert Hadamard(64, 32).matrix().count_nonzero() == 64 * 32


@pytest.mark.parametrize("seeds", [(None, None), (1, 2)])
def test_hadamard_matrices_by_heads_are_one_map(seeds: tuple[int | None, int | None]) -> None:
    heads = Block([Hadamard(64, 32, seed) for seed in seeds]).double()
    for map in (heads, Repeat(heads, repeat=3, heads=2)):
        one, x = joined(map), gaussian(64, map.size)
        assert isinstance(one, Hadamard) and one.order == 32
        assert torch.equal(one.transposed_solve(x), map.transposed_solve(x))
        assert torch.equal(one.solve(x), map.solve(x))


@pytest.mark.parametrize(
    "map",
    [
        Block([Hadamard(64, 32), Hadamard(64, 16)]),
        Block([Hadamard(64, 32), Hadamard(64, 32, 0)]),
        Block([Hadamard(12, 8), Hadamard(12, 8)]),
        Block([Hadamard(64, 32), Diagonal(torch.ones(64))]),
        Repeat(Block([Hadamard(64, 32), Hadamard(64, 32)]), repeat=2, heads=4),
        Hadamard(64, 32),
    ],
)
def test_other_maps_are_not_joined(map: Transform) -> None:
    assert joined(map) is map


def test_wrappers_are_the_matrices_of_their_names() -> None:
    a, b = affine(3, seed=0), affine(4, seed=10)
    torch.testing.assert_close(Block([a, b]).matrix(), torch.block_diag(a.matrix(), b.matrix()))
    torch.testing.assert_close(Block([a, b]).shift, torch.cat([a.shift, b.shift]))
    torch.testing.assert_close(Block([a.linear_part, b]).shift, torch.cat([torch.zeros_like(a.shift), b.shift]))
    product = Kronecker(a.linear_part, b.linear_part)
    torch.testing.assert_close(product.matrix(), torch.kron(a.matrix(), b.matrix()))
    nested = Affine(b)
    nested.offset.data = gaussian(4, seed=20)
    torch.testing.assert_close(nested.shift, b.shift + nested.offset)


def test_compose_applies_its_parts_in_order() -> None:
    first, second = affine(4, seed=0), affine(4, seed=10)
    both = Compose([first, second])
    torch.testing.assert_close(both.matrix(), second.matrix() @ first.matrix())
    torch.testing.assert_close(both.shift, second.matrix() @ first.shift + second.shift)
    torch.testing.assert_close(Compose([first, second.linear_part]).shift, second.matrix() @ first.shift)
    assert Compose([first.linear_part, second.linear_part]).shift is None


def test_repeat_lays_query_heads_over_value_heads() -> None:
    heads = [affine(3, seed=seed) for seed in (0, 10)]
    grouped = Repeat(Block(heads), repeat=2, heads=2)
    by_head = [heads[0], heads[0], heads[1], heads[1]]
    torch.testing.assert_close(grouped.matrix(), torch.block_diag(*(head.matrix() for head in by_head)))
    torch.testing.assert_close(grouped.shift, torch.cat([head.shift for head in by_head]))
    shared = Repeat(heads[0], repeat=3)
    torch.testing.assert_close(shared.matrix(), torch.block_diag(*3 * [heads[0].matrix()]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Hadamard(64, block=24), "block 24: choose a power of two"),
        (lambda: Hadamard(64, block=0), "block 0: choose a power of two"),
        (lambda: Hadamard(0), "must be positive"),
        (lambda: LU(torch.ones(3, 3)), "invertible"),
        (lambda: QR(torch.ones(3, 3)), "invertible"),
        (lambda: Diagonal(torch.tensor([1.0, 0.0])), "invertible"),
        (lambda: Diagonal(torch.tensor([1.0, torch.nan])), "invertible"),
        (lambda: Rotation(2 * torch.eye(3)), "orthogonal"),
        (lambda: Compose([]), "one size"),
        (lambda: Compose([Hadamard(4), Hadamard(8)]), r"\[4, 8\]"),
        (lambda: Block([]), "at least one"),
        (lambda: Repeat(Hadamard(6), repeat=2, heads=4), "4 heads"),
        (lambda: Repeat(Hadamard(6), repeat=0), "must be positive"),
        (lambda: Kronecker(Affine(Hadamard(2)), Hadamard(2)), "put Affine around"),
        (lambda: TRANSFORMS["lu"](size=4, init="nothing", block=4, seed=0), "known: block-hadamard"),
    ],
)
def test_what_cannot_be_is_refused(build: Callable[[], Transform], message: str) -> None:
    with pytest.raises(LatmixError, match=message):
        build()
