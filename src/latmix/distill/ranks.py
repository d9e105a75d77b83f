"""Several processes learn together: the ranks of `torchrun` or `accelerate launch`.

The layers of a model whose weights are frozen are sharded over the ranks (FSDP2): a rank holds its part of each, and a
whole layer only while it computes with it. Every rank sees its share of a batch's windows and holds all that learns;
gradients are averaged, so all ranks take the same step. A process by itself is the only rank, and nothing here costs it
anything. Given up: sharding of embedding and head, which every rank holds whole, and ranks that come and go.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from latmix.errors import FailedError

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for one that hangs. One that is gone is noticed at once."""


def started() -> int:
    """Which of a launcher's processes this is, 0 without one; where there are GPUs, its own becomes the current one."""
    if not dist.is_torchelastic_launched():
        return 0
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return int(os.environ["RANK"])


@contextmanager
def together() -> Iterator[None]:
    """Within, the processes of a launcher are one group; without a launcher, nothing.

    Raises: FailedError: another rank is gone.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise FailedError("Another process that took part in learning is gone; start all of them again.") from error
        raise
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(model: PreTrainedModel) -> None:
    """Spread the layers of a frozen model over the ranks, in place."""
    if world() == 1:
        return
    body = model.base_model
    mesh = init_device_mesh(model.device.type, (world(),))
    for module in list(body.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    whole = {parameter for parameter in body.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(body, mesh=mesh, ignored_params=whole)


def own(rows: Int[Tensor, " rows"]) -> Int[Tensor, " share"]:
    """This rank's share of the rows: as many as every other's, the last row again where they do not divide."""
    share = -(-len(rows) // world())
    mine = torch.arange(rank() * share, (rank() + 1) * share)
    return rows[mine.clamp(max=len(rows) - 1)]


def gathered(values: Shaped[Tensor, "share ..."], count: int) -> Shaped[Tensor, "{count} ..."]:
    """What all ranks computed of `own` rows, in the order of all `count` rows."""
    if world() == 1:
        return values
    every = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(every, values.contiguous())
    return torch.cat(every)[:count]


def average(tensors: Iterable[Float[Tensor, "..."]]) -> None:
    """Replace each tensor by its mean over the ranks."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world()
