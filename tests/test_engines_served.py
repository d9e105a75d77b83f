"""The commands that `latmix export` prints, run: an HTTP server each, and what it continues.

scripts/engines.sh FOLDER && pytest tests/test_engines_served.py --engines FOLDER
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import latmix
from latmix.assets import DEMO_MODEL
from latmix.cli import app
from latmix.export import fingerprint
from latmix.export.verify import ask
from tests.exported import with_random_biases
from tests.test_engines import CT, LEARNED, SMALL, TUNED
from tests.texts import CALIBRATION

pytestmark = pytest.mark.engines


@dataclass(frozen=True)
class Server:
    """Attributes:
    options: beyond the command: float32, as verified, and nothing compiled or threaded in a short test.
    path, asked: of the request that takes token ids and answers with them.
    """

    options: tuple[str, ...]
    path: str
    asked: dict[str, Any]

    def tokens(self, port: int, prompt: list[int], count: int, model: str) -> list[int]:
        length = {"max_tokens": count, "model": model} if "v1" in self.path else {"n_predict": count}
        body = json.dumps({"prompt": prompt, "temperature": 0, "ignore_eos": True, **length, **self.asked})
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{self.path}", body.encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        return found["choices"][0]["token_ids"] if "choices" in found else found["tokens"]


SERVERS = {
    "vllm": Server(("--dtype", "float32", "--enforce-eager"), "/v1/completions", {"return_token_ids": True}),
    "llama": Server(("--threads", "1"), "/completion", {"return_tokens": True, "cache_prompt": False}),
}


@pytest.mark.parametrize(
    ("recipe", "settings", "engine"),
    [
        ("latmix-plus", TUNED | CT, "vllm"),
        ("block-hadamard", SMALL | {"activations": "none"}, "vllm"),
        ("latmix-lu", LEARNED | {"target": "gguf"}, "llama"),
    ],
)
def test_the_printed_command_serves_what_was_verified(
    recipe: str, settings: dict[str, str], engine: str, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (engines / engine / ".done").exists():
        pytest.skip(f"no environment for {engine} in {engines}; scripts/engines.sh makes it")
    latmix.quantize(DEMO_MODEL, tmp_path / "run", recipe, CALIBRATION, 0, settings)
    with_random_biases(tmp_path / "run", 0.02)
    monkeypatch.chdir(tmp_path)
    target = "gguf" if engine == "llama" else "compressed-tensors"
    said = CliRunner().invoke(app, ["export", "run", "--to", target, "--out", "served"])
    assert said.exit_code == 0, said.output
    command = said.output.partition("Serve it with:\n\n")[2].splitlines()[0]
    request = fingerprint.read(tmp_path / "served").request
    verified = ask(tmp_path / "served", engine, request, str(engines / engine / "bin" / "python"))["greedy"].tolist()
    with serving(command, SERVERS[engine], engines / engine / "bin") as port:
        answered = SERVERS[engine].tokens(port, request["prompt"], request["continue"], "served")
    assert answered == verified and len(answered) >= 20
    if engine == "vllm":  # llama.cpp rounds activations differently
        assert answered == fingerprint.read(tmp_path / "served").tensors["greedy"].tolist()


@contextmanager
def serving(command: str, server: Server, programs: Path) -> Iterator[int]:
    """The port of a server that is up; gone at the end. `programs` is the folder where the command is looked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PATH": f"{programs.resolve()}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment.pop("PYTHONPATH", None)  # the engine's packages are its own
    words = [*shlex.split(command), *server.options, "--port", str(port)]
    with open("server.log", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait(process, port)
        yield port
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that are left


def wait(process: subprocess.Popen[bytes], port: int, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no server: {Path('server.log').read_text()[-3000:]}")
