"""A run that was stopped ends in the same bytes as one that was not, and nothing half done is taken for done."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latmix
from latmix import compiled, rundir
from latmix.errors import BusyError, DamagedError, InputError, WriteError
from latmix.pipeline import restore
from latmix.progress import Progress
from latmix.recipe import override
from latmix.recipes import find
from latmix.rundir import LOCK, SUMS
from latmix.workspace import LAYERS, MAY_CHANGE, TUNE, workspace
from tests.test_pipeline import save_tiny
from tests.texts import CALIBRATION

PLAIN = {
    "calibration.windows": "4",
    "calibration.held_out": "2",
    "calibration.window": "32",
    "online.qkv": "block-hadamard",
}
LEARNED = {"calibration.generated": "3"} | {
    f"{stage}.{key}": "2" for stage in ("learning", "tuning") for key in ("steps", "batch")
}
SETTINGS = {"block-hadamard": PLAIN, "latmix-plus": PLAIN | LEARNED | {"quantizer": "gptaq"}}


class Killed(BaseException):
    """What no handler of errors catches, as a process that is killed runs none."""


def quantize(model: Path, out: Path, recipe: str = "block-hadamard", **changes: str) -> latmix.Run:
    return latmix.quantize(model, out, recipe, CALIBRATION, 0, SETTINGS[recipe] | changes)


def content(run: Path) -> dict[str, object]:
    """Everything but the times: the files' bytes, and what the summary says."""
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix == ".safetensors"}
    summary = json.loads((run / "summary.json").read_text())
    return files | {key: summary[key] for key in summary if key not in ("stages", "kernels")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: quantize(model, folder / name, name).path for name in SETTINGS}


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """`stop(n, error)`: the n-th file from now on is not given its name."""
    original, left = os.replace, [-1]
    error: list[BaseException] = []

    def replace(old: Path, new: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error[0]
        original(old, new)

    def arm(count: int, raised: BaseException) -> int:
        """How many were left to go when it was armed last."""
        before, left[0] = left[0], count
        error[:] = [raised]
        return before

    monkeypatch.setattr(rundir.os, "replace", replace)
    yield arm


@pytest.mark.parametrize("recipe", SETTINGS)
def test_a_run_stopped_again_and_again_ends_in_the_same_bytes(
    recipe: str, model: Path, whole: dict[str, Path], tmp_path: Path, stop
) -> None:
    stops, out = 0, tmp_path / "run"
    while not out.exists():
        stop(4 + 3 * stops, Killed())  # further every time
        try:
            quantize(model, out, recipe)
        except Killed:
            stops += 1
            assert not out.exists()
    assert stops >= 3
    assert content(out) == content(whole[recipe])
    assert not list(out.rglob(".*.tmp")) and not (out / "work").exists() and not (out / LOCK).exists()


def test_a_run_killed_by_the_system_goes_on(model: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from latmix import rundir\n"
        "from tests.test_resume import quantize\n"
        "original, left = os.replace, [16]\n"
        "def replace(old, new):\n"
        "    left[0] -= 1\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if left[0] == 0 else original(old, new)\n"
        "rundir.os.replace = replace\n"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(model), str(tmp_path / "run")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    layers = list((tmp_path / "run.partial").glob("quantized-layer-*"))
    assert len(layers) == 1
    before = layers[0].stat().st_mtime_ns
    run = quantize(model, tmp_path / "run")
    assert (run.path / layers[0].name).stat().st_mtime_ns == before  # not computed again
    assert content(run.path) == content(whole["block-hadamard"])


def test_a_full_disk_is_an_error_and_the_run_goes_on(model: Path, whole: dict[str, Path], tmp_path: Path, stop) -> None:
    out = tmp_path / "run"
    stop(16, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(WriteError, match=r"No space left on device.*'.*run\.partial'; the same command goes on"):
        quantize(model, out)
    assert content(quantize(model, out).path) == content(whole["block-hadamard"])


def test_a_second_process_is_refused_and_disturbs_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = find("rtn")
    with workspace(out, recipe, lambda: {"model": "m"}, Progress()) as space:
        (space.folder / "precious").write_text("kept")
        with pytest.raises(BusyError, match=r"Another process works in '.*run\.partial'"):
            quantize(model, out)
        assert (space.folder / "precious").exists()
    assert (out / "precious").exists() and not (out / LOCK).exists()


class TestChanges:
    """What may differ in the call that goes on, and what may not."""

    @pytest.fixture
    def stopped(self, model: Path, tmp_path: Path, stop) -> Path:
        """Before the first layer."""
        out = tmp_path / "run"
        stop(5, Killed())
        with pytest.raises(Killed):
            quantize(model, out)
        stop(-1, Killed())
        return out

    def test_what_a_later_stage_reads_may_change_until_that_stage(self, model: Path, stopped: Path, stop) -> None:
        stop(15, Killed())
        with pytest.raises(Killed):
            quantize(model, stopped, quantizer="gptq:damping=0.02")
        with pytest.raises(InputError, match=r"holds a run with quantizer gptq:damping=0.02, and now it is rtn; go on"):
            quantize(model, stopped, quantizer="rtn")
        stop(-1, Killed())
        run = quantize(model, stopped, quantizer="gptq:damping=0.02")
        assert run.recipe.quantizer == find(str(run.path / "recipe.json")).quantizer

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("calibration.windows", "5", "calibration.windows 4, and now it is 5"),
            ("folded.values", "none", "folded.values block-hadamard, and now it is nothing"),
            ("activations", "mxint8", "activations mxfp4:scale=even, and now it is mxint8"),
        ],
    )
    def test_other_changes_are_refused_by_name(
        self, model: Path, stopped: Path, key: str, value: str, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            quantize(model, stopped, **{key: value})
        assert stopped.with_name("run.partial").exists()

    def test_another_model_is_refused(self, stopped: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="holds a run with model "):
            quantize(save_tiny(tmp_path / "other", intermediate_size=128), stopped)

    def test_the_same_model_trained_further_is_refused(self, model: Path, stopped: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(model, tmp_path / "other"))
        shard = bytearray((other / "model.safetensors").read_bytes())
        shard[-1] ^= 1
        (other / "model.safetensors").write_bytes(shard)
        with pytest.raises(InputError, match="holds a run with model "):
            quantize(other, stopped)

    def test_another_tokenizer_is_refused(self, model: Path, stopped: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(model, tmp_path / "other"))
        words = json.loads((other / "tokenizer.json").read_text())
        words["model"]["merges"] = words["model"]["merges"][:-100]
        (other / "tokenizer.json").write_text(json.dumps(words))
        with pytest.raises(InputError, match="holds a run with tokens "):
            quantize(other, stopped)

    def test_the_guide_has_the_table(self) -> None:
        page = (Path(__file__).parents[1] / "docs" / "guide" / "long-jobs.md").read_text("utf-8")
        words = {None: "always", LAYERS: "the first layer is quantized", TUNE: "tuning has begun"}
        rows = re.findall(r"^\| `([\w.]+)`[^|]*\| ([^|]+) \|$", page.partition("| recipe field |")[2], re.MULTILINE)
        assert dict(rows[: len(MAY_CHANGE)]) == {
            key.removeprefix("recipe."): words[stage] for key, stage in MAY_CHANGE.items()
        }

    def test_the_table_names_recipe_keys(self) -> None:
        known = {name for name, _ in _dotted(override(find("latmix-plus"), LEARNED))}
        assert {key.removeprefix("recipe.") for key in MAY_CHANGE} <= known


def _dotted(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        part = getattr(value, field.name)
        yield f"{prefix}{field.name}", part
        if dataclasses.is_dataclass(part):
            yield from _dotted(part, f"{prefix}{field.name}.")


def test_a_file_that_is_written_again_takes_the_leavings_of_the_killed_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".result.json.{dead.pid}.tmp", f".result.json.{os.getppid()}.tmp", ".result.json.mine.tmp"):
        (tmp_path / name).write_text("half")
    rundir.write_json(tmp_path / "result.json", [])
    assert {file.name for file in tmp_path.iterdir()} == {
        "result.json",
        f".result.json.{os.getppid()}.tmp",
        ".result.json.mine.tmp",
    }


def test_a_folder_of_somebody_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "precious").write_text("kept")
    with pytest.raises(latmix.LatmixError, match="holds 'precious' but no inputs.json"):
        quantize(model, tmp_path / "run")
    assert (partial / "precious").read_text() == "kept"


@pytest.mark.parametrize("damage", ["cut", "flip", "lose"])
def test_a_damaged_run_is_refused_by_the_name_of_the_file(damage: str, whole: dict[str, Path], tmp_path: Path) -> None:
    """Whichever file it is."""
    run = Path(shutil.copytree(whole["latmix-plus"], tmp_path / "run"))
    names = {file.name for file in run.iterdir()}
    assert {"config.json", "tokenizer.json", "recipe.json", "summary.json", "transforms.safetensors", SUMS} < names
    for file in run.iterdir():
        content = file.read_bytes()
        if damage == "lose":
            file.unlink()
        else:
            at = len(content) // 2
            file.write_bytes(content[:at] + (b"" if damage == "cut" else bytes([content[at] ^ 1]) + content[at + 1 :]))
        assert rundir.is_run(run)
        with pytest.raises(DamagedError, match=re.escape("damaged" if file.name == SUMS else file.name)):
            restore(run)
        file.write_bytes(content)
    restore(run)


@pytest.mark.parametrize("name", ["transforms.safetensors", "work/taught.1.0", "inputs.json", "work/stages.json"])
def test_a_damaged_half_done_run_is_refused(name: str, model: Path, tmp_path: Path, stop) -> None:
    stop(14, Killed())
    with pytest.raises(Killed):
        quantize(model, tmp_path / "run")
    stop(-1, Killed())
    file = tmp_path / "run.partial" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=rf"{name}' is not what was written there; remove '.*run\.partial'"):
        quantize(model, tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_config_and_tokenizer_of_a_half_done_run_are_under_checksum(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> dict[str, object]:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compiled, "status", killed)  # asked for last
        quantize(model, tmp_path / "run")
    file = tmp_path / "run.partial" / name
    content = file.read_bytes()
    file.write_bytes(content.replace(b"e", b"f", 1))
    with pytest.raises(DamagedError, match=f"{name}' is not what was written there"):
        quantize(model, tmp_path / "run")
    file.write_bytes(content)
    assert quantize(model, tmp_path / "run").path == tmp_path / "run"


def test_what_was_lost_of_a_run_that_only_wants_its_seal_is_missed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("latmix.workspace.finish", killed)
        quantize(model, tmp_path / "run")
    file = tmp_path / "run.partial" / "config.json"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DamagedError, match=r"config\.json' was written and is gone; remove '.*run\.partial'"):
        quantize(model, tmp_path / "run")
    file.write_bytes(content)
    restore(quantize(model, tmp_path / "run").path)


def test_a_layer_that_no_checksum_covers_is_refused(whole: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole["block-hadamard"], tmp_path / "run"))
    shutil.copy(run / "quantized-layer-00001.safetensors", run / "quantized-layer-00007.safetensors")
    with pytest.raises(DamagedError, match=f"holds 'quantized-layer-00007.safetensors', which {SUMS} does not list"):
        restore(run)


def test_the_checksums_are_those_of_sha256sum(whole: dict[str, Path]) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    run = whole["block-hadamard"]
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=run, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(list(run.iterdir())) - 1


def test_what_is_half_done_is_no_run(model: Path, tmp_path: Path, stop) -> None:
    stop(20, Killed())
    with pytest.raises(Killed):
        quantize(model, tmp_path / "run")
    assert not rundir.is_run(tmp_path / "run.partial")
