"""Pieces on threads: in order, few at a time, and nothing is left of it afterwards."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from latmix.numerics import parse_format
from latmix.numerics.fakequant import quantized_values
from latmix.threads import in_order


def test_results_come_in_order_and_few_items_are_under_way() -> None:
    taken, most = 0, 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(20):
            taken += 1
            yield item

    def work(item: int) -> tuple[int, int]:
        time.sleep(0.02 if item % 3 == 0 else 0.0)  # later ones are ready before
        return item, threading.get_ident()

    found = list[tuple[int, int]]()
    for made in in_order(work, items(), 3):
        most = max(most, taken - len(found))
        found.append(made)
    assert [item for item, _ in found] == list(range(20)) and most == 4
    idents = {ident for _, ident in found}
    assert 1 < len(idents) <= 3 and threading.get_ident() not in idents


@pytest.mark.parametrize(("count", "threads"), [(1, 3), (5, 1), (0, 3)])
def test_where_there_is_nothing_to_share_it_is_done_here(count: int, threads: int) -> None:
    found = list(in_order(lambda _: (threading.get_ident(), torch.get_num_threads()), range(count), threads))
    assert found == [(threading.get_ident(), torch.get_num_threads())] * count


def test_torch_has_one_thread_within_and_as_many_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.no_grad():
            found = list(in_order(lambda _: (torch.get_num_threads(), torch.is_grad_enabled()), range(9), 2))
        with ThreadPoolExecutor(1) as pool:
            new = pool.submit(torch.get_num_threads).result()
        assert set(found) == {(1, False)} and (torch.get_num_threads(), new) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_in_its_turn() -> None:
    def work(item: int) -> int:
        if item == 4:
            raise ValueError("four")
        return item

    found = list[int]()
    with pytest.raises(ValueError, match="four"):
        for item in in_order(work, range(9), 2):
            found.append(item)
    assert found == [0, 1, 2, 3]


def test_a_compiled_reference_takes_one_thread_at_a_time() -> None:
    """torch.compile falls over its own feet where two threads compile."""
    format = parse_format("mxfp4:scale=search")
    pieces, start = [*torch.randn(3, 32, 2048, generator=torch.Generator().manual_seed(0))], threading.Barrier(3)

    def work(piece: torch.Tensor) -> torch.Tensor:
        start.wait()
        return quantized_values(piece, format)

    together = list(in_order(work, pieces, 3))
    for one, piece in zip(together, pieces, strict=True):
        assert torch.equal(one, quantized_values.reference(piece, format))  # type: ignore[attr-defined]
