"""What goes wrong, as one tree: each class says the cause, the remedy and the exit code of the command line.

The message of an error is one sentence: the culprit, then the choices. `docs/errors.md` is generated from this file.
What is not in the tree is a bug of latmix, and keeps its traceback. Being interrupted is no error: Ctrl-C ends the
command line with 130, SIGTERM with 143.
"""

import inspect
from collections.abc import Iterator
from typing import ClassVar


class LatmixError(Exception):
    """Whatever latmix refuses or cannot finish; catch this one in a program.

    Cause: each of the classes below has its own; this one is not raised itself.
    Remedy: the message names it.
    """

    exit_code: ClassVar[int] = 2


class InputError(LatmixError):
    """Something you named or wrote does not exist, does not fit, or asks for what there is none of.

    Cause: an unknown name or recipe key, a value out of range, a missing file or folder, a text too short, an output
    that exists, an architecture or a wish that an engine cannot express.
    Remedy: choose among what the message lists. Nothing was computed and nothing was overwritten.
    """


class DamagedError(LatmixError):
    """A file is there, and holds something else than it should.

    Cause: a checkpoint, run or export that was cut short, changed or made by hand: a header that promises other bytes
    than the file has, a checksum that differs, tensors that do not fit `config.json`, NaN among the weights.
    Remedy: copy or download the file again; if it is latmix's own output, make it again from its input.
    """


class UnavailableError(LatmixError):
    """A package or an engine that this needs is not installed here.

    Cause: an optional extra (`latmix[eval]`, `latmix[plots]`, `latmix[export]`) or the engine itself is missing.
    Remedy: install what the message names, or choose the environment that has it (`--python`).
    """


class FailedError(LatmixError):
    """The input was good and the work could not be done.

    Cause: numbers that no longer make sense (a Hessian that is not positive definite, an engine that computes
    something else than the run); the classes below are special cases.
    Remedy: the message names the setting to change.
    """

    exit_code = 1


class DivergedError(FailedError):
    """Learning ran away: its loss became infinite, NaN, or far larger than where it began.

    Cause: a learning rate too large for this model, or NaN in a batch.
    Remedy: choose a smaller rate (`--set learning.lr=…`); what was learned before is kept.
    """


class WriteError(FailedError):
    """A file could not be written.

    Cause: a full disk, a missing permission, a file system that went away.
    Remedy: make room and run the same command again; what was finished before is not computed again.
    """


class BusyError(FailedError):
    """Another process works on the same output.

    Cause: two commands with the same `--out` or `--json`.
    Remedy: wait for the other one, or choose another `--out` or `--json`.
    """


def tree(root: type[LatmixError] = LatmixError) -> Iterator[type[LatmixError]]:
    """The classes below `root` and itself, parents first."""
    yield root
    for kind in root.__subclasses__():
        yield from tree(kind)


def explained(kind: type[LatmixError]) -> tuple[str, str, str]:
    """What an error says of itself: its one line, the cause and the remedy."""
    line, _, rest = " ".join((inspect.getdoc(kind) or "").split()).partition(" Cause: ")
    cause, _, remedy = rest.partition(" Remedy: ")
    return line, cause, remedy
