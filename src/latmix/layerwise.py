"""Learning each layer's maps on the error of that layer's output: FlatQuant's way (arXiv 2410.09426, section 3.3).

Every layer is taught by itself on the unquantized model's activations, so that layers do not wait for one another's
errors and only one of them is differentiated at a time. What is learned are the maps that belong to the layer alone.
Ranks share the windows of a batch.
Given up: targets downstream of the layer, and maps of the residual stream, which no layer owns.
"""

import math

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from latmix import ranks
from latmix.errors import DivergedError, InputError
from latmix.model.attach import Attached
from latmix.model.calibrate import Arguments, Stream
from latmix.model.parts import layers
from latmix.progress import Progress
from latmix.recipe import Layerwise
from latmix.transforms import evaluated_once

FLOOR = 0.1  # of the peak rate, left at the end


def learn_layers(
    attached: Attached,
    teacher: PreTrainedModel,
    windows: Int[Tensor, "windows window"],
    wish: Layerwise,
    seed: int,
    progress: Progress,
) -> None:
    """Learn the attached maps of each layer in place.

    Cost: epochs · windows forwards and backwards of each layer, and its outputs for all windows in memory, twice.
    Raises: LatmixError: the stream has a map, a layer none, the error is not finite, or batches do not divide over the
        processes.
    """
    if wish.batch % ranks.world() or len(windows) % ranks.world():
        raise InputError(
            f"{len(windows)} windows in batches of {wish.batch} cannot be shared out over {ranks.world()} processes."
        )
    if any(attached.maps.folded(site.name, 0) is not None for site in attached.arch.sites if site.stream):
        raise InputError("Layer-wise learning compares layers on the model's own stream; remove the stream's map.")
    stream = Stream(teacher, attached.arch, windows)
    students = layers(attached.model, attached.arch)
    progress.stage("learn layers", len(students))
    generator = torch.Generator().manual_seed(seed)
    for index, student in enumerate(students):
        entering = torch.cat(stream.hidden)
        stream.advance(index)
        leaving = torch.cat(stream.hidden)
        error = _learn_layer(
            student,
            stream.arguments[index],
            attached.maps.of_layer(index),
            entering,
            leaving,
            wish,
            generator,
        )
        progress.advance(f"layer {index}: relative error {error:.4f}")


def _learn_layer(
    student: nn.Module,
    arguments: Arguments,
    maps: nn.ModuleList,
    entering: Tensor,
    leaving: Tensor,
    wish: Layerwise,
    generator: torch.Generator,
) -> float:
    """Mean squared error over the last epoch, in units of what the layer adds to the stream."""
    if not (parameters := [p for p in maps.parameters() if p.requires_grad]):
        raise InputError("Layer-wise learning needs a learned map in every layer; set one in online or folded.")
    unit = (leaving - entering).square().mean()
    optimizer = torch.optim.AdamW(parameters)
    steps, step, total = wish.epochs * math.ceil(len(entering) / wish.batch), 0, 0.0
    for _ in range(wish.epochs):
        total = 0.0
        for picked in torch.randperm(len(entering), generator=generator).split(wish.batch):
            for group in optimizer.param_groups:
                group["lr"] = wish.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))
            own, step = ranks.own(picked).to(entering.device), step + 1
            with evaluated_once(maps):
                out = student(entering[own], **arguments)
                loss = F.mse_loss(out[0] if isinstance(out, tuple) else out, leaving[own]) / unit
                loss.backward()
            ranks.average(parameter.grad for parameter in parameters if parameter.grad is not None)
            optimizer.step()
            optimizer.zero_grad()
            total += float(ranks.gathered(loss.detach()[None], ranks.world()).mean()) * len(picked)
        if not math.isfinite(total):
            raise DivergedError("Layer-wise learning diverged; choose a smaller layerwise.lr.")
    return total / len(entering)
