"""An evaluation that was stopped ends in the same bytes as one that was not, and computes no batch again."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import latmix
from latmix.errors import BusyError, DamagedError, InputError, WriteError
from latmix.eval import kept as keeping
from latmix.eval.kept import kept
from latmix.eval.scores import BATCH
from latmix.progress import Progress
from latmix.rundir import alone
from tests.test_pipeline import OTHER, save_tiny, settings
from tests.texts import CALIBRATION

WINDOW = 32


class Killed(BaseException):
    """What no handler of errors catches, as a process that is killed runs none."""


class Stop(Progress):
    """Until so many batches are done. before: how many an earlier process did."""

    def __init__(self, batches: int) -> None:
        self.left, self.before, self._counts = batches, 0, False

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.before, self._counts = done, name == "evaluate"

    def advance(self, note: str = "") -> None:
        self.left -= self._counts
        if not self.left:
            raise Killed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    return latmix.quantize(model, out, "rtn", CALIBRATION, 0, settings("rtn")).path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(OTHER.read_text("utf-8"), "utf-8")
    return path


Evaluate = Callable[..., bytes]


@pytest.fixture
def evaluate(model: Path, run: Path, text: Path, tmp_path: Path) -> Evaluate:
    """Evaluates the run, or what else is asked for, and returns what the result file then holds."""

    def evaluate(out: str = "result.json", progress: Progress | None = None, **changes: object) -> bytes:
        asked = {"target": run, "text": text, "reference": model, "window": WINDOW} | changes
        latmix.evaluate(**asked, progress=progress, out=tmp_path / out)  # type: ignore[arg-type]
        assert not (tmp_path / f"{out}.partial").exists()
        return (tmp_path / out).read_bytes()

    return evaluate


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows each forward of a model took."""
    taken: list[int] = []
    original = PreTrainedModel.__call__

    def call(self: PreTrainedModel, *arguments: object, **options: object) -> object:
        if arguments:
            taken.append(len(arguments[0]))  # type: ignore[arg-type]
        return original(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "__call__", call)
    return taken


def stopped(evaluate: Evaluate, tmp_path: Path, after: int, before: int = 0, **changes: object) -> Path:
    """What is there when the process is killed after so many batches, and so many that were there."""
    told = Stop(after)
    with pytest.raises(Killed):
        evaluate(progress=told, **changes)
    assert told.before == before
    assert not (tmp_path / "result.json").exists()
    return tmp_path / "result.json.partial"


@pytest.mark.parametrize("changes", [{}, {"reference": None}], ids=["against the original", "alone"])
def test_no_batch_is_computed_again_and_no_bit_differs(
    changes: dict, evaluate: Evaluate, tmp_path: Path, forwards: list[int]
) -> None:
    whole = evaluate("whole.json", **changes)
    calls, batches = len(forwards), -(-json.loads(whole)["windows"] // BATCH)
    assert batches >= 5
    for before, after in ((0, 1), (1, 3), (4, 1)):
        stopped(evaluate, tmp_path, after, before, **changes)
    again = len(forwards)
    assert evaluate(**changes) == whole
    assert len(forwards) == 2 * calls  # as often as once without a stop
    assert again < 2 * calls


BATCHES = [(3, 6), (3, 6), (3, 6), (3, 2)]
RESULTS = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(BATCHES)]
WHAT = {"text": "0" * 64, "window": 7, "separator": None}


def finish(result: Path, what: dict = WHAT) -> int:
    """Add the batches that are not known, as an evaluation does; how many were."""
    with kept(result) as finished:
        finished.begin(what, BATCHES)
        for batch, expected in zip(finished.known, RESULTS, strict=False):
            assert torch.equal(batch, expected)
        for batch in RESULTS[len(finished.known) :]:
            finished.add(batch)
        return len(finished.known)


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """With two records."""
    with pytest.raises(Killed), kept(tmp_path / "unit.json") as finished:
        finished.begin(WHAT, BATCHES)
        for batch in RESULTS[:2]:
            finished.add(batch)
        raise Killed
    return tmp_path / "unit.json.partial"


def test_a_record_that_is_cut_short_or_damaged_is_computed_again(half: Path) -> None:
    data = half.read_bytes()
    head = data.index(b"\n") + 1
    size = (len(data) - head) // 2
    for at in range(head, len(data), 5):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        for damaged in (data[:at], flipped):
            half.write_bytes(damaged)
            assert finish(half.with_suffix("")) == (at - head) // size and not half.exists()
    half.write_bytes(data)
    assert finish(half.with_suffix("")) == 2


def test_what_was_killed_before_the_result_had_its_name_computes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed), kept(tmp_path / "unit.json") as finished:
        finished.begin(WHAT, BATCHES)
        for batch in RESULTS:
            finished.add(batch)
        raise Killed
    assert finish(tmp_path / "unit.json") == len(BATCHES)


def test_a_first_line_that_is_cut_short_is_written_again_and_a_damaged_one_refused(half: Path) -> None:
    data = half.read_bytes()
    for at in range(0, data.index(b"\n") + 1, 3):
        half.write_bytes(data[:at])
        assert finish(half.with_suffix("")) == 0
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        half.write_bytes(flipped)
        with pytest.raises((DamagedError, InputError), match=r"unit\.json\.partial"):
            finish(half.with_suffix(""))
        assert half.read_bytes() == flipped


@pytest.mark.parametrize("words", [b"precious", b"[1, 2]\n", b'"x"', b"1", b"[" * 5000])
def test_what_somebody_else_put_there_is_left_alone(words: bytes, tmp_path: Path) -> None:
    (tmp_path / "unit.json.partial").write_bytes(words)
    with pytest.raises(DamagedError, match="is no evaluation in the making"):
        finish(tmp_path / "unit.json")
    assert (tmp_path / "unit.json.partial").read_bytes() == words


class TestChanges:
    """Nothing that is measured may change, and what changed is named."""

    @pytest.fixture
    def partial(self, evaluate: Evaluate, tmp_path: Path) -> Path:
        return stopped(evaluate, tmp_path, 2)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"window": 16}, "window 32, and now it is 16"),
            ({"reference": None}, "reference [0-9a-f]{64}, and now it is None"),
            ({"separator": " and "}, "separator None, and now it is  and "),
        ],
    )
    def test_settings(self, changes: dict, named: str, evaluate: Evaluate, partial: Path) -> None:
        with pytest.raises(InputError, match=rf"result\.json\.partial' is of an evaluation with {named}"):
            evaluate(**changes)
        assert partial.exists()
        evaluate()

    def test_the_text(self, evaluate: Evaluate, partial: Path, text: Path, tmp_path: Path) -> None:
        (tmp_path / "other.txt").write_text(text.read_text() + "More.")
        with pytest.raises(InputError, match="with text [0-9a-f]{64}, and now it is [0-9a-f]{64}; go on with the same"):
            evaluate(text=tmp_path / "other.txt")

    def test_the_model(self, evaluate: Evaluate, partial: Path, model: Path, run: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="with model "):
            evaluate(target=model)
        other = latmix.quantize(
            model, tmp_path / "other", "rtn", CALIBRATION, 0, settings("rtn") | {"weights": "mxint8"}
        )
        with pytest.raises(InputError, match="with model "):
            evaluate(target=other.path)
        moved = Path(shutil.copytree(run, tmp_path / "moved"))
        assert evaluate(target=moved) == evaluate("whole.json")


def test_a_second_process_is_refused_and_disturbs_nothing(half: Path) -> None:
    before = half.read_bytes()
    with alone(half, "here"), pytest.raises(BusyError, match=r"Another process works on '.*\.partial'; wait for it"):
        finish(half.with_suffix(""))
    assert half.read_bytes() == before
    assert finish(half.with_suffix("")) == 2


def test_a_file_that_was_removed_before_it_was_locked_is_nobodys(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that had it, and finished."""
    lock = fcntl.flock

    def late(file: object, how: int) -> None:
        half.unlink()
        half.write_text("a third process's")
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BusyError):
        finish(half.with_suffix(""))
    assert half.read_text() == "a third process's"


def test_a_full_disk_is_an_error_and_the_evaluation_goes_on(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, original, left = evaluate("whole.json"), keeping._append, [4]

    def append(file: object, data: bytes) -> None:
        left[0] -= 1
        original(file, data if left[0] else data[:100])  # type: ignore[arg-type]
        if not left[0]:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(WriteError, match=r"\.partial.*No space left.*goes on"):
        patch.setattr(keeping, "_append", append)
        evaluate()
    assert (tmp_path / "result.json.partial").exists()
    assert evaluate() == whole
