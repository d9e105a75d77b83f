"""The command line as a user meets it: help, exit codes, files."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latmix.recipes import DEFAULT
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION, OTHER


def latmix(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "latmix", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_quantize_then_evaluate(model: Path, tmp_path: Path) -> None:
    chosen = [f"--set={key}={value}" for key, value in settings(DEFAULT).items()]
    run, report = tmp_path / "run", tmp_path / "report.json"
    done = latmix("quantize", model, "--out", run, "--calibration", CALIBRATION, "--seed", "3", *chosen)
    assert done.returncode == 0, done.stderr
    assert "held-out calibration text" in done.stdout
    assert json.loads((run / "recipe.json").read_text())["seed"] == 3
    done = latmix("evaluate", run, "--text", OTHER, "--reference", model, "--json", report, "--window", "32")
    assert done.returncode == 0, done.stderr
    values = json.loads(report.read_text())
    for key in ("perplexity", "kl", "top1_agreement"):
        assert values[key]["low"] <= values[key]["mean"] <= values[key]["high"]


def test_help_and_list_teach() -> None:
    assert "latmix quantize MODEL --out RUN" in latmix("--help").stdout
    assert "any recipe key" in " ".join(latmix("quantize", "--help").stdout.split())
    listed = latmix("list").stdout
    assert all(word in listed for word in ("latmix-lu", "mxfp4", "block-hadamard", "gptaq", "Qwen3ForCausalLM"))
    assert "mxfp4" not in latmix("list", "architectures").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "nowhere", "--out", "x"), "latmix: The model 'nowhere' is not a folder"),
        (("evaluate", "nowhere", "--text", "none.txt"), "latmix: The text 'none.txt' cannot be read"),
        (("quantize", "nowhere", "--out", "x", "--set", "seed"), "latmix: --set takes key=value, not 'seed'"),
        (("list", "models"), "'models' is not one of"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = latmix(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_flags_do_not_grow() -> None:
    """Everything that is not a path, a recipe, a seed or a protocol is a recipe key."""
    import typer.main

    from latmix.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: [p.name for p in command.params if p.param_type_name == "option"] for name, command in commands.items()
    }
    assert {name: len(found) for name, found in options.items()} == {
        "analyze": 6,
        "compare": 13,
        "demo": 2,
        "evaluate": 5,
        "export": 3,
        "list": 0,
        "plan": 3,
        "quantize": 5,
        "report": 1,
        "verify": 2,
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_told_by_the_exit_code_whatever_a_library_makes_of_it(number: signal.Signals) -> None:
    program = f"""
import os
from latmix.cli import app, main

@app.command()
def stop() -> None:
    try:
        os.kill(os.getpid(), {number:d})
    except BaseException:
        raise ValueError("could not determine the shape of object type 'UntypedStorage'") from None

main()
"""
    done = subprocess.run([sys.executable, "-c", program, "stop"], capture_output=True, text=True)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr and "Aborted." in done.stderr
