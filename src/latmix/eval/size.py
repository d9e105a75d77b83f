"""What a checkpoint weighs."""

import json
from dataclasses import dataclass
from pathlib import Path

PACKED = (".weight_packed", ".weight_scale", ".weight_global_scale")


@dataclass(frozen=True)
class Size:
    """Attributes:
    bytes: the checkpoint's tensor files on disk (a run's record of its transforms is not served, and not counted).
    bits_per_weight: bits of codes and scales per weight of the quantized linears; None where nothing is quantized.
    """

    bytes: int
    bits_per_weight: float | None


def size_of(folder: Path, quantized_weights: int) -> Size:
    """Read from the safetensors headers; no tensor is loaded.

    quantized_weights: how many weights the quantized linears of the model have.
    """
    packed = total = 0
    for file in sorted(folder.glob("quantized*.safetensors")) or sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        sizes = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        packed += sum(end - start for name, (start, end) in sizes.items() if name.endswith(PACKED))
        total += file.stat().st_size
    return Size(total, 8 * packed / quantized_weights if packed else None)
