"""Every code block of the README and the guide runs, as a newcomer would run it, on a tiny model called path/to/model.

Fenced blocks only. A page's blocks run in order in one folder, shell and Python in one each. Lines that set up the
machine (make, pip) are not run but held against what the Makefile and pyproject.toml offer.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import latmix
import latmix.export
from latmix.assets import CALIBRATION, EVALUATION
from latmix.cli import app
from latmix.recipe import Learning, Tuning
from latmix.transforms import TRANSFORMS
from tests.test_pipeline import save_tiny, settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def pages(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    save_tiny(tmp_path / "path" / "to" / "model", max_position_embeddings=32, **small)
    text = CALIBRATION.read_text("utf-8")
    (tmp_path / "text.txt").write_text(text, "utf-8")
    (tmp_path / "documents.txt").write_text(text.replace("\n\n", "<END>"), "utf-8")
    (tmp_path / "other.txt").write_text(EVALUATION.read_text("utf-8")[:4000], "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("latmix.analysis.candidates.STEPS", 20)
    for stage in (Learning, Tuning):  # the pages' words, fewer steps
        monkeypatch.setattr(f"latmix.recipes.affine.{stage.__name__}", partial(stage, steps=4))
    return tmp_path


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_pages_are_found() -> None:
    assert {"README.md", "docs/guide/first-model.md"} <= {name(page) for page in pages("bash")}
    assert {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text("utf-8"))} == {"bash", "python"}


@pytest.mark.parametrize("page", pages("bash"), ids=name)
def test_shell_blocks_run(page: Path, desk: Path) -> None:
    said = ""
    for line in (line for block in blocks(page, "bash") for line in block.splitlines() if line):
        program, *arguments = shlex.split(line)
        if program == "latmix":
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 0, f"{line}: {done.output} {done.exception}"
            said = done.output
        elif program in ("vllm", "llama-server"):  # tests/test_engines_served.py starts them
            assert f"Serve it with:\n\n{line}\n" in said, f"{line}: not what the export before it said: {said}"
        elif program in LAUNCHERS:
            words = [sys.executable, "-m", LAUNCHERS[program], *arguments[program == "accelerate" :]]
            done = subprocess.run([*words, "--set", "learning.steps=4"], capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
        else:
            assert_known(program, arguments)


def assert_known(program: str, arguments: list[str]) -> None:
    if program == "make":
        assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in arguments)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install" and set(re.findall(r"\[(\w+)\]", arguments[-1])) <= set(extras)
    elif program == "source":
        assert arguments == [".venv/bin/activate"]
    elif arguments[0] == "-c":
        assert program == "python"
        exec(compile(arguments[1], arguments[1], "exec"), {})  # noqa: S102
    else:
        script = next(word for word in arguments if word.endswith(".py"))
        assert program == "python" and (ROOT / script).is_file()


LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: name(page))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    """Links of every page; on the two that GitHub shows, paths in backticks too. mkdocs checks anchors."""
    text = page.read_text("utf-8")
    for target, _ in LINK.findall(text):
        assert "://" in target or (page.parent / target).exists(), target
    if page.parent == ROOT:
        for path in re.findall(r"`((?:docs|src|tests|scripts|benchmarks|examples)/[\w./*-]+)`", text):
            assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("page", pages("python"), ids=name)
def test_python_blocks_run(page: Path, desk: Path) -> None:
    before, room = TRANSFORMS.names(), {"__name__": "page"}
    if any('"served"' in block for block in blocks(page, "python")):  # what the page's readers have exported
        latmix.quantize("path/to/model", "for-transformers", "rtn", settings=settings("rtn"))
        latmix.export.export(Path("for-transformers"), "transformers", Path("served"))
    try:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), room)  # noqa: S102
    finally:
        for added in set(TRANSFORMS.names()) - set(before):
            del TRANSFORMS._things[added]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    source = ROOT / "examples" / "why_it_works.py"
    exec(compile(source.read_text("utf-8"), str(source), "exec"), {"__name__": "__main__"})
    assert "learned affine" in capsys.readouterr().out
