"""Does the engine compute what the run computed? Load the export there, ask, compare, write the verdict beside it.

Agreement is of perplexity on the fingerprint's windows: within 0.5 %, with at most 0.001 nats a token between the two,
where the engine rounds activations as the run did; and for llama.cpp, whose activations have 8 bits, between the run's
perplexity with and without rounded activations, give or take 1 %. Engine and run compute in float32 on the same token
ids; the tokenizer is compared by itself.
"""

import dataclasses
import datetime
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from latmix.errors import FailedError, InputError, UnavailableError
from latmix.export import card, fingerprint
from latmix.export.base import MANIFEST
from latmix.export.engines import run_transformers
from latmix.export.fingerprint import Fingerprint, following
from latmix.export.folder import open_export
from latmix.progress import Progress
from latmix.rundir import read_json
from latmix.seal import rewrite

SAME, BETWEEN, DIVERGED = 0.005, 0.01, 1e-3
MODULES = {"vllm": "vllm", "transformers": "transformers", "llama": "llama_cpp"}
OPTIONAL = ("transformers", "compressed-tensors")  # loads such folders by the package of that name
SCRIPTS = Path(__file__).parent / "engines"


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    perplexity, run_perplexity: the engine's and the run's, on the fingerprint's windows.
    run_weights_only: the run's with activations left alone.
    kl: of the engine's answers to the run's, nats a token, over the run's 64 likeliest tokens and the rest as one.
    greedy: how many tokens of the run's greedy continuation the engine repeats, from the first on, out of `of`.
    tokenizer: the engine makes the same ids of the text.
    """

    engine: str
    date: str
    perplexity: float
    run_perplexity: float
    run_weights_only: float
    kl: float
    greedy: int
    of: int
    tokenizer: bool
    passed: bool


def verify(
    folder: Path, engine: str | None = None, python: str | None = None, progress: Progress | None = None
) -> Verdict:
    """Load the export in an engine, compare with the run, write `verdict.json` and the model card.

    Args:
        engine: one of the manifest's; its first unless given.
        python: the interpreter of the engine's environment; this one unless given.
        progress: told of what is read for checksums, and that the engine is asked.

    Raises: LatmixError: a damaged export, an engine that cannot load it or is not installed.
    """
    manifest, progress = open_export(folder, progress), progress or Progress()
    engines = [name for name in MODULES if name in manifest["engines"]]
    engine = engine or next((name for name in manifest["engines"] if name in engines), "")
    if engine not in engines:
        raise InputError(f"The engine '{engine}' cannot serve '{folder}'; choose from {', '.join(engines)}.")
    expected = fingerprint.read(folder)
    if python is None and not installed(engine, manifest["target"]):
        raise UnavailableError(
            f"'{engine}' cannot load '{folder}' here: it or a package that it needs is not installed. "
            "scripts/engines.sh makes an environment for it: give its interpreter with --python."
        )
    progress.stage(f"ask {engine}", 1)
    verdict = judge(expected, ask(folder, engine, expected.request, python), engine)
    progress.advance()
    record(folder, engine, verdict)
    return verdict


def record(folder: Path, engine: str, verdict: Verdict) -> None:
    """Into `verdict.json`, beside other engines', and into the model card; one process after the other."""
    with (folder / MANIFEST).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_json(folder / card.VERDICT) if (folder / card.VERDICT).exists() else {}
        rewrite(folder / card.VERDICT, json.dumps(known | {engine: dataclasses.asdict(verdict)}, indent=2) + "\n")
        rewrite(folder / card.CARD, card.text(folder, folder))


def installed(engine: str, target: str) -> bool:
    """Whether this interpreter can load that export in that engine."""
    needed = {MODULES[engine]} | ({"compressed_tensors"} if (engine, target) == OPTIONAL else set())
    return all(importlib.util.find_spec(module) for module in needed)


def ask(folder: Path, engine: str, request: dict[str, Any], python: str | None) -> dict[str, np.ndarray]:
    """The answers of the engine's runner: transformers in this process, the others in one of their own.

    Raises: LatmixError: the engine failed; the end of what it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch) / "request.json", Path(scratch) / "answer.npz"
        question.write_text(json.dumps(request), "utf-8")
        if engine == "transformers" and python is None:
            run_transformers.main(str(folder), str(question), str(answer))
        else:
            program = interpreter(python) if python else sys.executable
            _run([program, str(SCRIPTS / f"run_{engine}.py"), str(folder.resolve())], question, answer)
        with np.load(answer) as found:
            return {name: found[name] for name in found}


def interpreter(python: str) -> str:
    """Its path from any folder, the link of a virtual environment as it is. Raises: InputError: there is none."""
    if (found := shutil.which(python)) is None:
        raise InputError(f"'{python}' cannot be started; give the path of an interpreter.")
    return os.path.abspath(found)


def _run(command: list[str], question: Path, answer: Path) -> None:
    environment = dict(os.environ) | {"OMP_WAIT_POLICY": "PASSIVE"}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # the other environment's packages are its own
    try:
        done = subprocess.run(
            [*command, str(question), str(answer)], capture_output=True, text=True, env=environment, cwd=answer.parent
        )
    except OSError as error:
        raise UnavailableError(f"'{command[0]}' cannot be started: {error.strerror}.") from error
    if done.returncode or not answer.exists():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise FailedError(f"'{Path(command[1]).name}' failed (exit code {done.returncode}):\n{said}")


def judge(expected: Fingerprint, answer: dict[str, np.ndarray], engine: str) -> Verdict:
    kept = expected.tensors
    logprobs = torch.from_numpy(answer["logprobs"])
    run, weights_only = perplexity(kept["target"]), perplexity(kept["target_weights_only"])
    found = perplexity(following(logprobs, kept["windows"]))
    low, high = sorted((run, weights_only)) if engine == "llama" else (run, run)
    limit = BETWEEN if engine == "llama" else SAME
    tokenizer = answer["tokens"].tolist() == kept["tokens"].tolist()
    kl = divergence(kept, logprobs)
    close = low * (1 - limit) <= found <= high * (1 + limit)  # NaN is not close
    close = close and (engine == "llama" or kl < DIVERGED)
    return Verdict(
        engine=str(answer["engine"]),
        date=str(datetime.date.today()),
        perplexity=found,
        run_perplexity=run,
        run_weights_only=weights_only,
        kl=kl,
        greedy=agreeing(kept["greedy"].tolist(), answer["greedy"].tolist()),
        of=len(kept["greedy"]),
        tokenizer=tokenizer,
        passed=bool(close and tokenizer),
    )


def perplexity(logprobs: Float[Tensor, "windows positions"]) -> float:
    return float(torch.exp(-logprobs.double().mean()))


def divergence(kept: dict[str, Tensor], logprobs: Float[Tensor, "windows positions vocabulary"]) -> float:
    """Mean KL(run ‖ engine), the tokens beyond the run's likeliest taken as one: a lower bound, close where they are
    many."""
    p = kept["top"].double()
    q = logprobs.double().gather(-1, kept["top_ids"].long())
    rest_p, rest_q = (torch.log1p(-each.exp().sum(-1).clamp(max=1 - 1e-9)) for each in (p, q))
    kl = (p.exp() * (p - q)).sum(-1) + rest_p.exp() * (rest_p - rest_q)
    return float(kl.mean())


def agreeing(ours: list[int], theirs: list[int]) -> int:
    pairs = list(zip(ours, theirs, strict=True))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
