"""The processes of `torchrun` or `accelerate launch`, the ranks, and what they do together.

All ranks go through the same stages. What is done already is for the first to say (`agreed`), and it writes what there
is one of. Work on independent things is shared out (`mine`, `shared_out`), and so are windows, in batches (`span`,
`own`); how models are, `latmix.sharding` says. A process by itself is the only rank, and nothing here costs it
anything. Given up: ranks that come and go.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor

from latmix.errors import FailedError

PATIENCE = timedelta(hours=1)
"""How long a rank waits for one that hangs, or is at what only one can do. One that is gone is noticed at once."""

LAUNCHER = "TORCHELASTIC_RUN_ID"
"""What tells a process that a launcher started it."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@contextmanager
def together() -> Iterator[None]:
    """Within, the processes of a launcher are one group, each with a GPU of its own as the current one where there are
    any; without a launcher, or within itself, nothing.

    Raises: FailedError: another rank is gone.
    """
    if dist.is_initialized():
        yield
        return
    if LAUNCHER in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend(), timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise FailedError("Another process that took part in this is gone; start all of them again.") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def launched_first() -> bool:
    """Whether this is the first of a launcher's processes, or the only one: also where they are no group."""
    return LAUNCHER not in os.environ or os.environ["RANK"] == "0"


def rank() -> int:
    """This process's number; 0 is the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    return rank() == 0


def wait() -> None:
    """Until all ranks are here."""
    if world() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, where there are GPUs too


def agreed(value: _Item) -> _Item:
    """What the first rank says."""
    if world() == 1:
        return value
    said: list[_Item | None] = [value]
    dist.broadcast_object_list(said)
    return said[0]  # type: ignore[return-value]


def mine(items: Sequence[_Item]) -> Sequence[_Item]:
    """This rank's share of things that do not depend on one another."""
    return items[rank() :: world()]


def shared_out(items: Sequence[_Item], work: Callable[[_Item], _Result]) -> list[_Result]:
    """The results of all items, each computed by one rank and pickled for the others: tensors in them are on the CPU
    where there are several ranks."""
    if world() == 1:
        return [work(item) for item in items]
    every: list[list[_Result]] = [[] for _ in range(world())]
    dist.all_gather_object(every, [work(item) for item in mine(items)])
    return [every[number % world()][number // world()] for number in range(len(items))]


def span(count: int, unit: int) -> slice:
    """This rank's share of `count` things in a row, cut between whole units."""
    units = -(-count // unit)
    start, stop = (units * number // world() * unit for number in (rank(), rank() + 1))
    return slice(min(start, count), min(stop, count))


def own(rows: Int[Tensor, " rows"]) -> Int[Tensor, " share"]:
    """This rank's share of the rows: as many as every other's, the last row again where they do not divide."""
    share = -(-len(rows) // world())
    part = torch.arange(rank() * share, (rank() + 1) * share)
    return rows[part.clamp(max=len(rows) - 1)]


def gathered(values: Shaped[Tensor, "share ..."], count: int) -> Shaped[Tensor, "{count} ..."]:
    """What all ranks computed of `own` rows, in the order of all `count` rows."""
    if world() == 1:
        return values
    every = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(every, values.contiguous())
    return torch.cat(every)[:count]


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def average(tensors: Iterable[Float[Tensor, "..."]]) -> None:
    """Replace each tensor by its mean over the ranks; those of sharded parameters are that already."""
    if world() > 1:
        for tensor in tensors:
            if not isinstance(tensor, DTensor):
                dist.all_reduce(tensor)
                tensor /= world()
