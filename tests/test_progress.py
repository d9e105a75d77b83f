"""What is told of long work, in the terminal and in the log."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import latmix
from latmix import export as exports
from latmix import progress, rundir
from latmix.cli import app
from latmix.cli.terminal import TerminalProgress
from latmix.errors import LatmixError
from latmix.export import fingerprint
from latmix.progress import Logged, Progress
from latmix.recipes import find
from tests.exported import WITH_GGUF
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION, OTHER


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


class Told(Progress):
    """Attributes: heard: of each stage its name, units, units done before and units done since."""

    def __init__(self) -> None:
        self.heard: list[list[object]] = []

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.heard.append([name, total, done, 0])

    def advance(self, note: str = "") -> None:
        self.heard[-1][-1] += 1  # type: ignore[operator]


def lines_of(log: Path) -> list[str]:
    return [line.split(" ", 2)[2] for line in log.read_text().splitlines()]


def test_units_without_a_note_are_in_the_log_once_in_a_while(tmp_path: Path, clock: list[float]) -> None:
    log = Logged(Progress(), tmp_path / "log.txt")
    log.stage("learn", 100)
    for _ in range(10):
        clock[0] += 25.0
        log.advance()
    clock[0] += 1.0
    log.advance("held-out KL 0.1000")
    assert lines_of(tmp_path / "log.txt") == [
        "learn: 100 to do",
        "learn: 3/100, 25 s each, 2425 s left",
        "learn: 6/100, 25 s each, 2350 s left",
        "learn: 9/100, 25 s each, 2275 s left",
        "learn: 11/100, held-out KL 0.1000, 22.8 s each, 2031 s left",
    ]


def test_what_was_done_before_does_not_count_for_the_time_left(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with TerminalProgress() as shown:
        log = Logged(shown, tmp_path / "log.txt")
        log.stage("learn", 100, 60)
        clock[0] += 90.0
        log.advance()
    assert lines_of(tmp_path / "log.txt") == [
        "learn: 100 to do, 60 of them done already",
        "learn: 61/100, 90 s each, 3510 s left",
    ]
    assert re.search(r"learn .* 61/100 .* 0:58:30\s+left, 90 s\s+each", capsys.readouterr().err, re.DOTALL)


def test_the_terminal_shows_units_pace_and_note(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress() as shown:
        shown.stage("quantize", 4)
        for index in range(4):
            shown.advance(f"layer {index}")
    words = capsys.readouterr().err
    assert re.search(r"quantize .*4/4 .* s\s+each\s*layer 3", words, re.DOTALL), words


def test_a_run_that_goes_on_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the model is told in MiB; of steps and layers, those that are not taken again."""
    monkeypatch.setattr(rundir, "READ", 2**16)
    model, out, told = save_tiny(tmp_path / "model"), tmp_path / "run", Told()
    size = -(-(model / "model.safetensors").stat().st_size // 2**16)
    wish = settings("latmix-qr") | {"learning.steps": "4", "learning.evaluate_every": "1"}

    class Stop(Told):
        """In the third step, and after the first layer."""

        def advance(self, note: str = "") -> None:
            super().advance(note)
            name, _, done, since = self.heard[-1]
            if (name, done, since) in (("learning", 0, 3), ("quantize", 0, 1)):
                raise KeyboardInterrupt

    def quantize(progress: Progress) -> None:
        latmix.quantize(model, out, "latmix-qr", CALIBRATION, 0, wish, progress)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize(Stop())
    quantize(told)
    assert ["read the model, MiB", size, 0, size] in told.heard
    assert ["quantize", 2, 1, 1] in told.heard
    log = lines_of(out / "log.txt")
    assert log[0] == f"read the model, MiB: {size} to do" and {"load: 2 to do", "learning: 4 to do"} < set(log)
    assert "learning: 4 to do, 2 of them done already" in log
    assert "quantize: 2 to do, 1 of them done already" in log


def of(stage: str, told: Told) -> list[list[object]]:
    """Units, done before and since, of each stage of that name."""
    return [units for name, *units in told.heard if name == stage]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A run, and what was told of it."""
    out, told = tmp_path_factory.mktemp("runs") / "run", Told()
    latmix.quantize(model, out, "latmix-plus", CALIBRATION, 0, settings("latmix-plus"), told)
    return out, told


def test_tuning_tells_of_the_layers_before_and_after(tuned: tuple[Path, Told]) -> None:
    out, told = tuned
    names = [stage[0] for stage in told.heard]
    assert of("free", told) == of("write", told) == [[2, 0, 2]]
    assert names.index("quantize") < names.index("free") < names.index("tuning") < names.index("write")
    assert {"free: 2 to do", "write: 2 to do"} < set(lines_of(out / "log.txt"))


def test_stages_follow_one_another(model: Path, tuned: tuple[Path, Told], tmp_path: Path) -> None:
    """None begins inside another, whose units would count as its own: every one ends where it said. Without maps
    nothing has loaded the teacher before it writes."""
    without, told = replace(find("latmix-plus"), folded=find("block-hadamard").folded, learning=None), Told()
    wish = {key: value for key, value in settings("latmix-plus").items() if not key.startswith("learning")}
    latmix.quantize(model, tmp_path / "run", without, CALIBRATION, 0, wish, told)
    assert of("generate", told) and not of("learning", told)
    for name, total, before, since in [*told.heard, *tuned[1].heard]:
        assert total == before + since, name  # type: ignore[operator]


def test_an_evaluation_tells_of_what_it_reads_and_has_a_log(
    model: Path, tuned: tuple[Path, Told], tmp_path: Path
) -> None:
    told, result = Told(), tmp_path / "new" / "result.json"
    latmix.evaluate(tuned[0], OTHER, model, 64, progress=told, out=result)
    names = [stage[0] for stage in told.heard]
    assert names == ["check, MiB", "load", "load", "read the model, MiB", "evaluate"]
    assert all(total == since for _, total, _, since in told.heard)
    assert of("load", told) == [[2, 0, 2], [21, 0, 21]]  # layers of the run, tensors of the model
    log = lines_of(result.with_name("result.json.log"))
    assert [line.partition(":")[0] for line in log if "to do" in line] == names
    assert {path.name for path in result.parent.iterdir()} == {"result.json", "result.json.log"}


def test_an_evaluation_that_does_not_begin_leaves_nothing(model: Path, tmp_path: Path) -> None:
    told = Told()
    with pytest.raises(LatmixError, match="A window of 1 tokens"):
        latmix.evaluate(model, OTHER, window=1, progress=told, out=tmp_path / "result.json")
    assert told.heard and not list(tmp_path.iterdir())
    latmix.evaluate(model, OTHER, window=64, out=tmp_path / "result.json")
    before = lines_of(tmp_path / "result.json.log")
    with pytest.raises(LatmixError, match="A window of 1 tokens"):
        latmix.evaluate(model, OTHER, window=1, out=tmp_path / "result.json")
    assert lines_of(tmp_path / "result.json.log")[: len(before)] == before  # nor does it take away


def test_an_export_tells_of_tensors_and_passes_and_has_a_log(
    tuned: tuple[Path, Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "CONTINUE", 3)

    class Stop(Told):
        """In the third pass."""

        def advance(self, note: str = "") -> None:
            super().advance(note)
            if (self.heard[-1][0], self.heard[-1][3]) == ("fingerprint", 5):
                raise KeyboardInterrupt

    out, told = tmp_path / "out", Told()
    with pytest.raises(KeyboardInterrupt):
        exports.export(tuned[0], "transformers", out, first := Stop())
    exports.export(tuned[0], "transformers", out, told)
    tensors = len(load_file(out / "model.safetensors"))
    assert of("write", first) == [[tensors, 0, tensors]] and of("write", told) == [[tensors, tensors, 0]]
    assert of("fingerprint", first) == [[8, 0, 5]] and of("fingerprint", told) == [[8, 4, 4]]  # passes of two layers
    assert [stage[0] for stage in told.heard] == ["check, MiB", "check, MiB", "write", "fingerprint"]
    log = lines_of(out / "log.txt")
    assert f"write: {tensors} to do" in log and "fingerprint: 8 to do, 4 of them done already" in log
    exports.open_export(out, told)  # and no checksum is wrong
    assert "  log.txt\n" in (out / "SHA256SUMS").read_text()


@WITH_GGUF
def test_a_gguf_tells_of_its_tensors(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "CONTINUE", 1)
    run = latmix.quantize(model, tmp_path / "run", "rtn", CALIBRATION, 0, settings("rtn")).path
    exports.export(run, "gguf", tmp_path / "out", told := Told())
    assert of("write", told) == [[22, 0, 22]]  # the head of the file, three, and nine of each layer


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["evaluate", "RUN", "--text", str(OTHER), "--window", "64"], ["check, MiB", "load", "evaluate"]),
        (["export", "RUN", "--to", "transformers", "--out", "OUT"], ["write", "fingerprint"]),
    ],
)
def test_commands_show_it(
    words: list[str], stages: list[str], tuned: tuple[Path, Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "CONTINUE", 1)
    monkeypatch.setattr(exports, "installed", lambda *_: False)
    places = {"RUN": str(tuned[0]), "OUT": str(tmp_path / "out")}
    shown = CliRunner().invoke(app, [places.get(word, word) for word in words])
    assert shown.exit_code == 0, shown.output
    for stage in stages:
        assert re.search(rf"{stage} .*\d+/\d+", shown.stderr), shown.stderr
