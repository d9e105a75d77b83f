"""Two processes that learn together do what one does, hold half of the layers each, and survive the loss of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import LEARNING, learned

SCRIPT = Path(__file__).with_name("ranks.py")


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SCRIPT), str(folder), *arguments], capture_output=True, text=True, timeout=240, env=environment
    )


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launched(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for rounded in (False, True):
        learned(folder, rounded)
    return folder


def test_with_nothing_rounded_two_do_what_one_does_within_a_thousandth(one: Path, two: Path) -> None:
    """The maps move by some 1e-2; the rest is the order of sums, which Adam enlarges where gradients are near zero."""
    for a, b in zip(result(one, "exact")["curve"], result(two, "exact")["curve"], strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    expected, actual = (load_file(folder / "exact.safetensors") for folder in (one, two))
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() < 5e-4, name


def test_with_rounding_the_first_step_is_the_same(one: Path, two: Path) -> None:
    """Later ones differ as codes flip: a thousandth of the loss at the second, some per cent after six."""
    a, b = result(one, "rounded")["curve"], result(two, "rounded")["curve"]
    assert b[:2] == [pytest.approx(step, rel=1e-5) for step in a[:2]]
    assert b[-1]["loss"] == pytest.approx(a[-1]["loss"], rel=0.1)


def test_a_rank_holds_its_part_of_the_layers(one: Path, two: Path) -> None:
    whole, part = result(one, "exact")["held"], result(two, "exact")["held"]
    kept = 2 * 96 * 64 + 64  # embedding, head and last norm
    assert part == kept + (whole - kept) // 2


def test_losing_a_rank_ends_learning_and_the_rest_is_learned_from_the_snapshot(two: Path, tmp_path: Path) -> None:
    lost = launched(tmp_path, str(LEARNING.steps - 1))
    assert lost.returncode == 1 and "took part in learning is gone" in lost.stderr
    assert (tmp_path / "rounded.snapshot").exists() and not (tmp_path / "rounded.json").exists()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "rounded.snapshot", alone)
    learned(alone, rounded=True)
    before = LEARNING.steps - 2  # where it was measured, and kept, last
    assert result(alone, "rounded")["curve"][: before + 1] == result(two, "rounded")["curve"][: before + 1]
    again = launched(tmp_path)
    assert again.returncode == 0, again.stderr
    assert result(tmp_path, "rounded") == result(two, "rounded")
    assert (tmp_path / "rounded.safetensors").read_bytes() == (two / "rounded.safetensors").read_bytes()
