"""A Hugging Face folder as it lies on the disk: its config and what its tensors are called, none of them read yet.

`skeleton` is the model without weights; `fill` puts the weights into a part of it, as float32, `empty` takes them out
again. So a model of any size can be gone through a layer at a time. Everything that can be known without reading a
tensor is checked on opening; numbers are checked when they are read. Remote code is never run. Given up: downloads
(pass a local folder), and checkpoints that are quantized already.
"""

import copy
import ctypes
import functools
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from latmix.archs import ARCHS, Arch
from latmix.errors import DamagedError, InputError
from latmix.model.shards import stored_tensors
from latmix.model.sizes import check_config
from latmix.model.tensors import FLOATS, Tensors
from latmix.numerics.rounding import finite
from latmix.progress import Progress
from latmix.rundir import digests, read_json
from latmix.threads import in_order

T = TypeVar("T")

READERS = 16
"""Threads that share the pieces of a tensor at most: more would wait for the one that reads them from the disk."""


@dataclass(frozen=True)
class Source:
    """Attributes: tensors: of the checkpoint, by its own names."""

    path: Path
    arch: Arch
    config: PreTrainedConfig
    tensors: Tensors

    @property
    def longest(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """How many tokens it has."""
        return int(self.config.vocab_size)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    def skeleton(self) -> PreTrainedModel:
        return skeleton(self.path, self.config)

    def name(self, parameter: str) -> str:
        """What the checkpoint calls a parameter of the model."""
        tied = self.config.tie_word_embeddings and parameter == f"{self.arch.head}.weight"
        return f"{self.arch.embedding}.weight" if tied else parameter

    def tensor(self, parameter: str) -> Tensor:
        """In float32. Raises: DamagedError: it cannot be read, or is not finite."""
        shape = self.tensors.stored[self.name(parameter)].shape
        whole = torch.empty(shape, device=pick_device())

        def put(piece: Tensor, at: int) -> None:
            whole[at : at + len(piece)] = piece

        deque(self.pieces(parameter, put), maxlen=0)
        return whole

    def pieces(self, parameter: str, work: Callable[[Tensor, int], T], together: int = 1) -> Iterator[T]:
        """What `work` makes of some rows at a time, in float32, and of the first one's number: in whole runs of
        `together`, on as many threads as torch has, up to `READERS` (`threads.in_order`).

        Raises: DamagedError: as `tensor`.
        """
        name, device = self.name(parameter), pick_device()
        if 1 < together == self.tensors.stored[name].shape[0]:
            yield work(self.tensor(parameter), 0)
            return

        def widened(found: tuple[int, Tensor]) -> T:
            at, piece = found
            wide = piece.to(device, torch.float32)
            if not finite(wide):
                raise DamagedError(f"The tensor '{name}' in '{self.path}' holds NaN or infinity.")
            return work(wide, at)

        threads = min(torch.get_num_threads(), READERS) if device.type == "cpu" else 1
        yield from in_order(widened, self.tensors.pieces(name, together), threads)

    def fill(
        self, module: nn.Module, path: str, left_out: Collection[str] = (), progress: Progress | None = None
    ) -> None:
        """Read every parameter of the module that stands at `path`; '' is the whole model.

        left_out: names of parameters that stay as they are. progress: told of every one that is read.

        Raises: DamagedError: one cannot be read, or is not finite.
        """
        for name, _ in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            if name in left_out:
                continue
            found = nn.Parameter(self.tensor(f"{path}.{name}" if path else name), requires_grad=False)
            setattr(module.get_submodule(owner), attribute, found)
            if progress is not None:
                progress.advance()

    @contextmanager
    def filled(self, module: nn.Module, path: str) -> Iterator[None]:
        """Within, the module has its weights; afterwards it has none."""
        self.fill(module, path)
        try:
            yield
        finally:
            empty(module)

    def digest(self, progress: Progress | None = None) -> str:
        """SHA-256 of the config, of which file each tensor is in, and of those files: a model that was trained further
        under the same name is another model. Cost: one pass over all of them, a second for two gigabytes on each
        thread, and a thread for each file."""
        config = read_json(self.path / "config.json")
        places = {name: stored.shard.name for name, stored in self.tensors.stored.items()}
        files = sorted({stored.shard for stored in self.tensors.stored.values()})
        sums = digests(files, progress, "read the model", torch.get_num_threads())
        shards = {file.name: found for file, found in sums.items()}
        return hashlib.sha256(json.dumps([config, places, shards], sort_keys=True).encode()).hexdigest()


def open_source(path: Path | str) -> Source:
    """Cost: the headers; no tensor is read.

    Raises: LatmixError: no such folder, no or broken config, unknown architecture, missing or truncated files, tensors
        that are missing, of another shape than the config says, or no floating point numbers.
    """
    path = Path(path)
    arch, config = read_arch(path), read_config(path)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"The model '{path}' is quantized already; give the original.")
    source = Source(path, arch, config, Tensors(stored_tensors(path)))
    last = f"{arch.layers}.{source.layers - 1}."
    if not any(name.startswith(last) for name in source.tensors.stored):  # before as many layers are built
        raise DamagedError(f"The checkpoint in '{path}' lacks the tensors of '{last[:-1]}', which its config promises.")
    wanted = {source.name(name): parameter for name, parameter in source.skeleton().named_parameters()}
    stored = source.tensors.stored
    if missing := sorted(wanted.keys() - stored.keys()):
        raise DamagedError(f"The checkpoint in '{path}' lacks {len(missing)} tensors, among them '{missing[0]}'.")
    for name, parameter in wanted.items():
        if stored[name].shape != tuple(parameter.shape):
            raise DamagedError(
                f"The tensor '{name}' in '{path}' is {stored[name].shape}; its config says {tuple(parameter.shape)}."
            )
        if stored[name].dtype not in FLOATS:
            raise InputError(f"The tensor '{name}' in '{path}' holds {stored[name].dtype}; give a model in bfloat16.")
    return source


def skeleton(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model in evaluation mode, its parameters on the meta device; tables that are computed are there. Its config
    is its own: absorbing gains unties the head.

    Raises: DamagedError: a config that makes no model.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
        for name, module in list(model.named_modules()):
            if any(True for _ in module.buffers(recurse=False)):
                model.set_submodule(name, type(module)(config=config).to(pick_device()))
        if (path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a value that nobody checked before it was used; the library names no kind
        raise DamagedError(f"'{path / 'config.json'}' makes no model: {error!r}.") from error
    model.eval().requires_grad_(False)
    return model


def empty(module: nn.Module, *names: str) -> None:
    """Let go of the parameters of these names, of all where none is named; hooks and buffers stay.

    Their memory, and what work on them left behind, goes back to the system: the C library would keep what lies between
    things in use, a little more with each layer.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not names or name in names:
                setattr(owner, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; None where the C library is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def tie(model: PreTrainedModel, arch: Arch) -> None:
    """Where the config ties the head to the embedding, they share the embedding's weight."""
    if model.config.tie_word_embeddings:
        head, embedding = model.get_submodule(arch.head), model.get_submodule(arch.embedding)
        head.weight = embedding.weight


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_config(path: Path) -> PreTrainedConfig:
    """Raises: LatmixError: a config that transformers cannot make sense of."""
    try:
        config: PreTrainedConfig = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # as in `skeleton`
        raise DamagedError(f"'{path / 'config.json'}' makes no model: {error!r}.") from error
    return config


def read_arch(path: Path) -> Arch:
    """Raises: LatmixError: no folder, no config, or a family that is not declared."""
    if not path.is_dir():
        raise InputError(f"The model '{path}' is not a folder; give a local Hugging Face checkpoint folder.")
    config = read_json(path / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"'{path / 'config.json'}' names no model_type; known architectures: {', '.join(ARCHS)}.")
    check_config(config, path / "config.json")
    return ARCHS[kind]
