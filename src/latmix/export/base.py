"""What an export is: a target's rules (`latmix.targets`) and the writer of its files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latmix.export.source import Source
from latmix.progress import Progress
from latmix.registry import Registry


@dataclass(frozen=True)
class Export:
    """Attributes:
    write: fills a folder with everything but the model card and the manifest; resumes what is half done, and tells of
        every tensor.
    serve: the exact commands that serve the finished folder of a recipe with these activations.
    engines: names of the runners in `latmix.export.engines` that can load it; the first is the default.
    """

    write: Callable[[Source, Path, Progress], None]
    serve: Callable[[Path, str | None], str]
    engines: Callable[[Source], tuple[str, ...]]


EXPORTS: Registry[Export] = Registry("export")
MANIFEST = "latmix.json"  # of the finished folder
TENSORS = (".safetensors", ".gguf")  # endings of the files that weigh
