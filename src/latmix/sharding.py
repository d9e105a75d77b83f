"""A model in parts (FSDP2): a rank holds its rows of every parameter of a layer, of the embedding and of the head, and
each of these whole only while it computes with it.

What does not learn and what does are sharded alike; a sharded parameter is a `DTensor`, and so is its gradient, which
is the mean over the ranks already. Given up: products by a rank's own rows of the head, which would need no whole one.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from latmix import ranks


def shard(module: nn.Module, offload: bool = False) -> None:
    """Spread a layer, or a table, over the ranks, in place: a share of the rows of every parameter for each (`part`).

    offload: what it holds waits in the CPU's memory, and comes to the GPU while the module computes; for one rank, too.
    """
    if offload and not dist.is_initialized():
        dist.init_process_group(ranks.backend(), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if offload or ranks.world() > 1:
        policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
        # whatever runs it: the head stands in no module that fetches it ahead, and is not to stay whole for that
        fully_shard(module, mesh=_mesh(module), offload_policy=policy, reshard_after_forward=True)


def join_layers(body: nn.Module) -> None:
    """Of the module that runs the sharded embedding and layers, which then fetch one another ahead."""
    if is_sharded(body):
        apart = {parameter for parameter in body.parameters() if not isinstance(parameter, DTensor)}
        fully_shard(body, mesh=_mesh(body), ignored_params=apart)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def computes_on(module: nn.Module) -> torch.device:
    """Where its inputs belong, wherever its parameters wait."""
    parameter = next(module.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def _mesh(module: nn.Module) -> DeviceMesh:
    return init_device_mesh(computes_on(module).type, (ranks.world(),))


def part(tensor: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "share ..."]:
    """The rows that this rank holds of a parameter under `shard`."""
    if ranks.world() == 1:
        return tensor
    shares = tensor.chunk(ranks.world())
    return shares[ranks.rank()].clone() if ranks.rank() < len(shares) else tensor[:0].clone()


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of it; to be changed in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Put together, if it is sharded: then all ranks ask alike."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all ranks have whole, as the other one is sharded, if it is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def total_norm(tensors: Iterable[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """The norm of all of them together, sharded ones with the other ranks' parts."""
    every = list(tensors)
    alike = nn.utils.get_total_norm(each for each in every if not isinstance(each, DTensor))
    parts = nn.utils.get_total_norm(held(each) for each in every if isinstance(each, DTensor)) ** 2
    ranks.add_up(parts)
    return alike.hypot(parts.sqrt().to(alike.device))
