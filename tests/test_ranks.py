"""Two processes that work together do what one does, hold half of the model each, and survive the loss of one."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import latmix
from latmix import sharding, whole
from latmix.model import spread
from latmix.model.source import Source
from latmix.progress import Progress
from tests.ranks import ABOUT, LEARNING, RUNS, WINDOW, all_parts
from tests.test_pipeline import save_tiny
from tests.test_resume import content

SCRIPT = Path(__file__).with_name("ranks.py")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def launched(
    folder: Path, model: Path, *death: str, launcher: tuple[str, ...] = TORCHRUN
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in (sys.executable, "-m", *launcher, SCRIPT, folder, model, *death)]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)


def curve(folder: Path, name: str) -> list[dict[str, float]]:
    return json.loads((folder / f"{name}.json").read_text())


def held(folder: Path, name: str, rank: int) -> int:
    return int((folder / f"{name}.held.{rank}").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen2", tied=True)


def begin(folder: Path, like: Path) -> None:
    """What is left there of the text and the answers where whoever writes them is killed in the middle."""
    shutil.copytree(like / "text", folder / "text", dirs_exist_ok=True)
    for sums in (folder / "text").glob("*.parts"):
        file = sums.with_suffix("")
        os.truncate(file, file.stat().st_size * 7 // 10)  # five batches of nine and a part; one of two
    (folder / "text.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def two(model: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two make, of text and answers the rest of what one has begun."""
    folder = tmp_path_factory.mktemp("two")
    begin(folder, one)
    done = launched(folder, model)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    torch.set_num_threads(1)  # as the launcher gives each of several
    all_parts(folder, model)
    torch.set_num_threads(threads)
    return folder


def test_with_nothing_rounded_two_do_what_one_does_within_a_thousandth(one: Path, two: Path) -> None:
    """The maps move by some 1e-2; the rest is the order of sums, which Adam enlarges where gradients are near zero."""
    for a, b in zip(curve(one, "exact"), curve(two, "exact"), strict=True):
        assert b == pytest.approx(a, rel=1e-3)
    expected, actual = (load_file(folder / "exact.safetensors") for folder in (one, two))
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() < 5e-4, name


def test_with_rounding_the_first_step_is_the_same(one: Path, two: Path) -> None:
    """Later ones differ as codes flip: a thousandth of the loss at the second, some per cent after six."""
    a, b = curve(one, "rounded"), curve(two, "rounded")
    assert b[:2] == [pytest.approx(step, rel=1e-5) for step in a[:2]]
    assert b[-1]["loss"] == pytest.approx(a[-1]["loss"], rel=0.1)


def test_two_tune_what_one_tunes(one: Path, two: Path) -> None:
    a, b = curve(one, "tuned"), curve(two, "tuned")
    assert min(step["held_out"] for step in a if "held_out" in step) < a[0]["held_out"]
    assert b == [pytest.approx(step, rel=1e-3) for step in a]
    expected, actual = (load_file(folder / "tuned.safetensors") for folder in (one, two))
    for name, tensor in expected.items():
        if tensor.dtype == torch.uint8:  # codes
            assert (actual[name] != tensor).float().mean() < 1e-3, name
        else:
            assert (actual[name] - tensor).abs().max() < 5e-4, name


def same_text(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "text.safetensors") for folder in (one, other))
    assert len(a["text"].unique(dim=0)) == 68
    return torch.equal(a["text"], b["text"]) and torch.allclose(a["answers"], b["answers"], atol=1e-5)


def test_two_write_on_as_one_would(one: Path, two: Path) -> None:
    assert same_text(one, two)


def test_two_learn_layer_by_layer_what_one_learns(one: Path, two: Path) -> None:
    """The maps move by 2e-2. Rounding is in the loop: after 16 steps instead of six they differ by 2e-3."""
    expected, actual = (load_file(folder / "layered.safetensors") for folder in (one, two))
    moved = [
        (expected[name.replace("before", "after")] - x).abs().max() for name, x in expected.items() if "before" in name
    ]
    assert max(moved) > 1e-2
    for name, tensor in expected.items():
        assert (actual[name] - tensor).abs().max() < 2e-4, name


def test_a_rank_holds_its_part_of_the_model(one: Path, two: Path) -> None:
    norm = 64  # the last one, which every rank has whole
    for name, rank in itertools.product(("exact", "kept"), (0, 1)):
        assert held(two, name, rank) == norm + (held(one, name, 0) - norm) // 2
    # of what tunes, all but the scales, which every rank has whole: one for 32 weights beside a latent and two limits
    weights = 3 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert (
        held(one, "tuned", 0) - held(two, "tuned", 0) == held(one, "tuned", 0) - held(two, "tuned", 1) == weights // 2
    )


@pytest.mark.parametrize("name", RUNS)
def test_two_quantize_to_the_same_bytes_as_one(name: str, one: Path, two: Path) -> None:
    assert content(two / name) == content(one / name)


@pytest.mark.parametrize("name", ABOUT)
def test_two_tune_a_run_to_about_what_one_does(name: str, one: Path, two: Path) -> None:
    """Its tables lie on a disk, once, in bfloat16, where a last digit may differ."""
    curves = ((folder / name / "tuning.jsonl").read_text().splitlines() for folder in (one, two))
    a, b = ([json.loads(line) for line in lines] for lines in curves)
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-3)
    assert min(step["held_out"] for step in a if step["held_out"]) < a[0]["held_out"]
    for file in ("quantized-embedding.safetensors", "quantized-head.safetensors"):
        expected, actual = (load_file(folder / name / file) for folder in (one, two))
        for key, tensor in expected.items():
            torch.testing.assert_close(actual[key], tensor, rtol=2**-7, atol=1e-4)


def test_accelerate_launch_starts_the_same_two_processes(model: Path, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tuned.*", *RUNS, *ABOUT))
    done = launched(tmp_path, model, launcher=ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert [held(tmp_path, "tuned", rank) for rank in (0, 1)] == [held(two, "tuned", rank) for rank in (0, 1)]
    assert (tmp_path / "tuned.safetensors").read_bytes() == (two / "tuned.safetensors").read_bytes()
    for name in RUNS:
        assert content(tmp_path / name) == content(two / name)


@pytest.mark.parametrize(("recipe", "stage", "held"), [("latmix-qr", "learning", 1), ("block-hadamard", "tuning", 0)])
def test_what_waits_in_the_cpus_memory_learns_the_same(
    recipe: str, stage: str, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they have nowhere else to be: that memory is saved, it does not show. held: frozen models that are still
    there while steps are taken, of the student and not of the teacher."""
    settings = WINDOW | {"calibration.held_out": "4", f"{stage}.steps": "2", f"{stage}.checkpointing": "true"}
    model = save_tiny(tmp_path / "model", tied=True)
    plain = latmix.quantize(model, tmp_path / "plain", recipe, seed=0, settings=settings)
    made: list[weakref.ref[object]] = []
    alive: set[int] = set()

    def spread_one(source: Source, progress: Progress) -> object:
        found = spread.spread(source, progress)
        made.append(weakref.ref(found))
        return found

    class Watch(Progress):
        def stage(self, name: str, total: int, done: int = 0) -> None:
            self.name = name

        def advance(self, note: str = "") -> None:
            if self.name == stage:
                alive.add(sum(model() is not None for model in made))

    for place in (spread, whole):
        monkeypatch.setattr(place, "too_large", lambda *_: True)
    monkeypatch.setattr(whole, "spread", spread_one)
    offloaded = Mock(side_effect=sharding.shard)
    monkeypatch.setattr(spread, "shard", offloaded)
    waiting = latmix.quantize(model, tmp_path / "waiting", recipe, seed=0, settings=settings, progress=Watch())
    # two layers, embedding and head of two models; the teacher's head once more, for its answers
    assert [call.args[1] for call in offloaded.call_args_list] == [True] * 9
    assert alive == {held}
    assert content(waiting.path) == content(plain.path)


def test_losing_a_rank_ends_the_work_and_the_rest_is_done_from_what_is_there(
    model: Path, two: Path, tmp_path: Path
) -> None:
    lost = launched(tmp_path, model, str(LEARNING.steps - 1))
    assert lost.returncode == 1 and "took part in this is gone" in lost.stderr
    assert (tmp_path / "rounded.snapshot").exists() and not (tmp_path / "rounded.json").exists()
    lost = launched(tmp_path, model, "layer")
    assert lost.returncode == 1 and "took part in this is gone" in lost.stderr
    assert curve(tmp_path, "rounded") == curve(two, "rounded")
    for name in ("rounded", "tuned"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (two / f"{name}.safetensors").read_bytes()
    assert same_text(two, tmp_path)
    partial, alone = tmp_path / "calibrated.partial", tmp_path / "alone"
    files = {file.name for file in partial.glob("quantized-layer-*")}
    assert files == {"quantized-layer-00000.safetensors"}
    shutil.copytree(partial, alone / partial.name)
    shutil.copytree(tmp_path, alone, dirs_exist_ok=True, ignore=shutil.ignore_patterns("alone", "*.partial"))
    begin(alone, tmp_path)
    all_parts(alone, model)  # one process goes on from what two left
    assert same_text(two, alone)
    assert content(alone / "calibrated") == content(two / "calibrated")
