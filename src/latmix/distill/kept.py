"""A tensor of many windows that outlives the process: in one file, batch by batch (`latmix.growing`).

Whoever wants the same again reads it; a batch that is not as it was written is made again, and so are all after it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from latmix import ranks
from latmix.errors import WriteError
from latmix.growing import growing


def kept(
    file: Path, shape: Sequence[int], dtype: torch.dtype, batch: int, make: Callable[[int], Iterator[Tensor]]
) -> Shaped[Tensor, "windows ..."]:
    """The file's content, mapped, once all of it is there.

    make: the windows from that one on, so many batches at a time as there are ranks, which make them together; the
        first one writes, all read.

    Raises: WriteError: the disk has no room; what it had room for stays.
    """
    window = math.prod(shape[1:]) * dtype.itemsize
    sizes = [len(rows) * window for rows in torch.arange(shape[0]).split(batch)]
    try:
        with growing(file, sizes) if ranks.first() else nullcontext() as found:
            done = ranks.agreed(found.done if found else 0)
            known = done % ranks.world()  # of what the ranks make together, a batch each
            for together in make((done - known) * batch):
                for made in together.split(batch)[known:]:
                    if found is not None:
                        found.add(made.view(torch.uint8).numpy().reshape(-1).data)
                known = 0
    except OSError as error:
        raise WriteError(f"'{file.name}' does not fit into '{file.parent}': {error.strerror}.") from error
    ranks.wait()
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=dtype).view(*shape)


def name_of(*asked: object, windows: Int[Tensor, "windows window"]) -> str:
    """Sixteen hex digits for what was asked about these windows."""
    text = json.dumps([*map(str, asked), hashlib.sha256(windows.numpy().tobytes()).hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
