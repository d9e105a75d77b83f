"""The large tables of a model, embedding and head, into the stream's basis and onto the disk, some rows at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latmix.model.attach import seen_by_head
from latmix.model.checkpoint import KEPT
from latmix.model.fold import absorb, fold_embedding, head_folding
from latmix.model.maps import Maps
from latmix.model.source import Source
from latmix.model.tensors import Rows, write


@torch.no_grad()
def write_embedding(source: Source, maps: Maps, file: Path) -> None:
    """maps: in float64. Raises: LatmixError: bad numbers, a full disk."""
    name, stream = f"{source.arch.embedding}.weight", maps.stream(source.arch)

    def moved(piece: Tensor, at: int) -> Tensor:
        return (piece if stream is None else fold_embedding(piece, stream)).to(KEPT)

    write(file, {name: Rows(source.tensors.stored[name].shape, KEPT, source.pieces(name, moved))}, {})


@torch.no_grad()
def write_head(source: Source, maps: Maps, file: Path) -> None:
    """Final norm and head; the norm's gain is in the head, whose bias the stream's shift makes.

    maps: in float64. Raises: LatmixError: bad numbers, a map that does not fold, a full disk.
    """
    arch = source.arch
    norm, head = f"{arch.final_norm}.weight", f"{arch.head}.weight"
    gain, stream = source.tensor(norm), maps.stream(arch)
    folding = None if stream is None else head_folding(len(gain), stream)
    biases: list[Tensor] = []

    def moved(piece: Tensor, at: int) -> tuple[Tensor, Tensor | None]:
        absorb(gain, piece)
        bias = None if folding is None else folding.move(piece, None, at)
        return piece.to(KEPT), None if bias is None else bias.to(KEPT)

    def pieces() -> Iterator[Tensor]:
        for piece, bias in source.pieces(head, moved):
            if bias is not None:
                biases.append(bias)
            yield piece

    shape = source.tensors.stored[source.name(head)].shape
    tensors: dict[str, Tensor | Rows] = {norm: torch.ones_like(gain, dtype=KEPT), head: Rows(shape, KEPT, pieces())}
    if stream is not None and seen_by_head(stream).shift is not None:
        tensors[f"{arch.head}.bias"] = Rows(shape[:1], KEPT, biases)  # full once the head is written
    write(file, tensors, {})
