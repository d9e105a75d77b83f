"""C++ of this package, compiled when first needed; and what has computed so far.

The system's compiler takes a second or two for a file, once per process. A library needs no headers of torch and is
called through ctypes, which costs a few microseconds. Given up: keeping it on disk between processes, where it would
have to be told apart by compiler and processor.
"""

import ctypes
import functools
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

NAME = "C++"
# No flag that changes a result: products and sums are not contracted, zeros keep their signs.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp")
SMALL = 1 << 12
"""Elements from which kernels by hand are used: below, their compilation would outlast all they are asked for."""

P, T = ParamSpec("P"), TypeVar("T")

_COMPILING = threading.Lock()
_used: set[str] = set()
_failures: dict[str, str] = {}


def library(source: Path) -> ctypes.CDLL:
    """Raises: OSError: no compiler. subprocess.CalledProcessError: it failed."""
    with _COMPILING:  # of several threads that want it first, one compiles
        return _library(source)


@functools.cache
def _library(source: Path) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / source.with_suffix(".so").name
        subprocess.run(
            ["c++", "-std=c++17", *FLAGS, "-shared", "-fPIC", source, "-o", target],
            check=True,
            capture_output=True,
            text=True,
        )
        return ctypes.CDLL(str(target))


def attempt(name: str, run: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T | None:
    """`run(*arguments)`, or None where kernels of that name do not work, which is said once."""
    if name in _failures or torch.compiler.is_compiling():
        return None
    try:
        out: T = run(*arguments, **keywords)
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:  # RuntimeError: all of torch.compile's
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        _failures[name] = said.strip().splitlines()[0]
        warnings.warn(f"No kernels by {name}: {_failures[name]}", stacklevel=3)
        return None
    _used.add(name)
    return out


def status() -> str:
    """What has computed so far ("C++, torch.compile"; "reference" if nothing has), and what cannot, and why."""
    return "; ".join(
        [", ".join(sorted(_used)) or "reference", *(f"no {name}: {why}" for name, why in _failures.items())]
    )
