"""Pieces of a tensor on several threads, in order.

torch's own threads share out one operation at a time, for which a piece that stays in the cache is too small; and what
stands between two operations is one thread's. Here every thread goes its own way with a piece of its own.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch

A, B = TypeVar("A"), TypeVar("B")


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """What `work` makes of each item, in their order; within it torch has one thread. At most one more item than there
    are threads is under way. A single item is done here, with all of torch's threads.

    Raises: what `work` and `items` raise, in order too.
    """
    items = iter(items)
    first = list(islice(items, 2))
    if threads == 1 or len(first) < 2:
        yield from map(work, chain(first, items))
        return
    before, gradients = torch.get_num_threads(), torch.is_grad_enabled()

    def alone(item: A) -> B:
        with torch.set_grad_enabled(gradients):  # a setting of each thread
            return work(item)

    waiting: deque[Future[B]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in chain(first, items):
                waiting.append(pool.submit(alone, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)  # which threads that are new would else take from the pool's
