"""Comparisons: killed and started again they end in the same table; a failed cell says why."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import latmix
from latmix.cli import app
from latmix.comparison import Texts, compare, plan, pool, results, table
from latmix.comparison.cell import _reason, compute
from latmix.comparison.plan import FULL_PRECISION, Cell, Measures
from latmix.comparison.results import Figure
from latmix.comparison.seeds import seeded
from latmix.errors import DamagedError, LatmixError
from latmix.recipe import override
from latmix.recipes import RECIPES, find
from latmix.rundir import JOURNAL, write_json
from latmix.seal import seal
from tests.test_pipeline import FAST, save_tiny, settings
from tests.texts import CALIBRATION, OTHER

TIMING = ("seconds", "peak_bytes")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose cells cannot but fail."""
    file = tmp_path_factory.mktemp("recipes") / "broken.json"
    file.write_text(override(find("gptq"), {"name": "broken", "weights": "fp4"}).to_json())
    return file


def command(model: Path, out: Path, recipes: str) -> list[str]:
    options = {"--recipes": recipes, "--out": out, "--calibration": CALIBRATION, "--text": OTHER, "--jobs": 2}
    words = [str(part) for pair in options.items() for part in pair]
    return [
        sys.executable,
        "-m",
        "latmix",
        "compare",
        str(model),
        *words,
        *(f"--set={k}={v}" for k, v in FAST.items()),
    ]


def rows_without_times(out: Path) -> list[dict[str, object]]:
    rows = json.loads((out / "table.json").read_text())
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    CliRunner().invoke(app, command(model, out, "rtn")[3:])
    return out


def test_killed_and_started_again_gives_the_same_table_and_a_failure_stops_nothing(
    model: Path, whole: Path, broken: Path, tmp_path: Path
) -> None:
    words = command(model, tmp_path / "killed", f"rtn,{broken}")
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (finished := sorted((tmp_path / "killed").glob("cells/*/evaluation-*.json"))):
        assert first.poll() is None, "ended before a cell was finished"
        time.sleep(0.02)
    assert len(list((tmp_path / "killed").glob("cells/*/log.txt"))) == 2  # side by side
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = [(file, file.stat().st_mtime_ns) for file in finished]

    again = CliRunner().invoke(app, words[3:])
    assert again.exit_code == 1, again.output  # one cell failed
    assert "broken, seed 0: Unknown format 'fp4'" in again.output
    assert [(file, file.stat().st_mtime_ns) for file in finished] == before
    assert not list((tmp_path / "killed").glob("cells/*/*.partial"))
    rows = rows_without_times(tmp_path / "killed")
    assert [row["name"] for row in rows] == [FULL_PRECISION, "rtn", "broken"]
    assert rows[2]["perplexity"] is None and rows[1]["perplexity"] is not None

    assert rows_without_times(whole) == rows[:2]

    tables = {kind: (tmp_path / "killed" / f"table.{kind}").read_bytes() for kind in ("json", "csv", "md")}
    CliRunner().invoke(app, words[3:])  # nothing left to do but the one that fails
    assert tables == {kind: (tmp_path / "killed" / f"table.{kind}").read_bytes() for kind in tables}


def test_two_processes_share_the_cells_and_losing_one_ends_both(model: Path, whole: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += command(model, tmp_path / "two", "rtn,quarot-rtn")[1:]
    words[words.index("--jobs") + 1] = "1"
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (finished := sorted((tmp_path / "two").glob("cells/*/evaluation-*.json"))):
        assert first.poll() is None, "ended before a cell was finished"
        time.sleep(0.02)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert first.wait(60) == 1
    before = [(file, file.stat().st_mtime_ns) for file in finished]
    again = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [(file, file.stat().st_mtime_ns) for file in finished] == before
    rows = rows_without_times(tmp_path / "two")
    assert [row["name"] for row in rows] == [FULL_PRECISION, "rtn", "quarot-rtn"] and rows_without_times(whole) == rows[
        :2
    ]
    logs = [file.read_text() for file in (tmp_path / "two").glob("cells/*/log.txt")]
    assert len(logs) == 3 and all(row["perplexity"] is not None for row in rows)


class Killed(BaseException):
    """What no handler of errors catches, as a process that is killed runs none."""


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    compare(model, [], out, texts=Texts(CALIBRATION, OTHER))
    return out


@pytest.mark.parametrize("operation", range(6))
def test_killed_while_the_table_is_written_the_same_table_comes_out(
    operation: int, finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files, each filled under another name and renamed: before the rename and after it."""
    out = shutil.copytree(finished, tmp_path / "out")
    expected = {kind: (finished / f"table.{kind}").read_bytes() for kind in ("md", "csv", "json")}
    for kind in expected:
        (out / f"table.{kind}").write_text("of fewer cells")
    replace, renamed = os.replace, list[object]()

    def killed(source: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) == operation // 2 + 1:
            if operation % 2:
                replace(source, target)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            compare(model, [], out, texts=Texts(CALIBRATION, OTHER))
    whole = {kind: (out / f"table.{kind}").read_bytes() for kind in expected}
    assert all(whole[kind] in (expected[kind], b"of fewer cells") for kind in expected)
    compare(model, [], out, texts=Texts(CALIBRATION, OTHER))
    assert expected == {kind: (out / f"table.{kind}").read_bytes() for kind in expected}


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"), [(0, "", {"all"}), (2, "", {"0", "1"}), (2, "4,7", {"4", "7"})]
)
def test_cells_run_side_by_side_and_every_gpu_has_its_own(
    gpus: int, visible: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither process ends well before the other has begun."""
    ended = list[Cell]()
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(pool, "WORKER", "tests.besides")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cells = [Cell(name, 0, str(tmp_path / name), "m", "c", None, Measures("t"), "d") for name in ("one", "other")]
    assert pool.default_jobs() == max(1, gpus)
    pool.run_cells(cells, 2, ended.append)
    assert sorted(cell.name for cell in ended) == ["one", "other"]
    assert {Path(cell.folder, "visible").read_text() for cell in cells} == expected


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    cell = one_cell(model, tmp_path_factory.mktemp("undisturbed"))
    compute(cell)
    return cell.evaluation.read_bytes()


def one_cell(model: Path, out: Path) -> Cell:
    measures = Measures(str(OTHER))
    return plan.cells(model, ["block-hadamard"], out, 1, CALIBRATION, measures, settings("block-hadamard"))[1]


@pytest.mark.parametrize("moment", ["comparison.cell.quantize", "comparison.cell.evaluate", "evaluation.write_json"])
def test_a_cell_that_was_killed_between_its_steps_ends_in_the_same(
    moment: str, model: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a run: tests/test_resume.py."""
    cell = one_cell(model, tmp_path)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(f"latmix.{moment}", killed)
        with pytest.raises(Killed):
            compute(cell)
    assert not cell.finished and cell.run.is_dir() == (moment != "comparison.cell.quantize")
    compute(cell)
    assert cell.finished and cell.evaluation.read_bytes() == undisturbed


def test_a_cell_is_named_by_everything_that_decides_it(model: Path, tmp_path: Path) -> None:
    def folders(text: Path = OTHER, calibration: Path = CALIBRATION, **settings: str) -> list[str]:
        made = plan.cells(model, ["quarot-rtn", "quarot"], tmp_path, 2, calibration, Measures(str(text)), settings)
        return [cell.folder for cell in made]

    plain = folders()
    assert len(set(plain)) == 5 and folders() == plain
    assert folders(text=CALIBRATION) == plain  # the evaluation's own name changes instead
    assert folders(calibration=OTHER)[0] == plain[0] and not set(folders(calibration=OTHER)[1:]) & set(plain)
    assert not set(folders(weights="mxint4")[1:]) & set(plain)
    (one,) = plan.cells(model, [], tmp_path, 1, CALIBRATION, Measures(str(OTHER)), {})
    assert Cell.from_json(one.to_json()) == one
    with pytest.raises(LatmixError, match="Two recipes are called 'gptq'"):
        plan.cells(model, ["gptq", "gptq"], tmp_path, 1, CALIBRATION, Measures(str(OTHER)), {})


NOT_RANDOM = {"rtn", "gptq", "block-hadamard", "mr-gptq", "wush"}


def test_a_recipe_without_anything_random_is_computed_once(model: Path, tmp_path: Path) -> None:
    assert {name for name in RECIPES if not seeded(find(name))} == NOT_RANDOM
    assert seeded(override(find("block-hadamard"), {"folded.values": "rotation:init=random-rotation"}))
    made = plan.cells(model, ["gptq", "quarot"], tmp_path, 3, CALIBRATION, Measures(str(OTHER)), {})
    assert [(cell.name, cell.seed) for cell in made[1:]] == [("gptq", 0), *(("quarot", seed) for seed in range(3))]


@pytest.mark.parametrize("name", [*sorted(NOT_RANDOM), "quarot-rtn"])
def test_a_seed_changes_what_it_is_said_to_change(name: str, model: Path, tmp_path: Path) -> None:
    runs = [latmix.quantize(model, tmp_path / f"{seed}", name, CALIBRATION, seed, settings(name)) for seed in (0, 1)]
    one, other = ({k: v for f in run.path.glob("quantized-*") for k, v in load_file(f).items()} for run in runs)
    assert seeded(find(name)) != all(tensor.equal(other[key]) for key, tensor in one.items())


def test_settings_go_to_the_recipes_that_have_the_part() -> None:
    settings = {"learning.steps": "7", "calibration.windows": "5"}
    learned, plain = plan.adapted(find("latmix-lu"), settings), plan.adapted(find("gptq"), settings)
    assert learned.learning is not None and learned.learning.steps == 7
    assert plain.learning is None and plain.calibration.windows == 5
    with pytest.raises(LatmixError, match="Unknown recipe key 'lerning.steps'"):
        plan.adapted(find("gptq"), {"lerning.steps": "7"})


def test_a_text_is_split_by_documents(tmp_path: Path) -> None:
    whole = tmp_path / "whole.txt"
    whole.write_text("\n\n".join(f"story {i}" for i in range(10)))
    first, rest = plan.split_text(whole, "\n\n", 0.7, tmp_path)
    assert first.read_text().split("\n\n") == [f"story {i}" for i in range(7)]
    assert rest.read_text().split("\n\n") == [f"story {i}" for i in range(7, 10)]
    with pytest.raises(LatmixError, match="leaves nothing"):
        plan.split_text(whole, "\n\n", 1.0, tmp_path)


def fabricated(tmp_path: Path, name: str, seed: int, kl: float, items: dict[str, list[float]]) -> Cell:
    recipe = None if name == FULL_PRECISION else find(name)
    measures = Measures("text", tasks=tuple(items))
    cell = Cell(name, seed, str(tmp_path / f"{name}{seed}"), "model", "calibration", recipe, measures, "digest")
    stages = {"load": {"seconds": 1.0, "peak_bytes": 5}, "quantize": {"seconds": 2.0 + seed, "peak_bytes": 7 + seed}}
    estimate = {"mean": kl, "low": kl - 0.1, "high": kl + 0.1}
    cell.run.parent.mkdir(parents=True, exist_ok=True)
    (cell.run.parent / JOURNAL).touch()
    files = {
        cell.evaluation: {"perplexity": estimate, "kl": estimate, "top1_agreement": estimate, "bits_per_weight": 4.25}
    }
    if recipe:
        files[cell.run / "summary.json"] = {"stages": stages}
    for task, right in items.items():
        score = {"accuracy": float(np.mean(right)), "stderr": 0.1, "items": right}
        files[cell.task(task)] = score
    for file, value in files.items():
        write_json(file, value)
    if recipe:
        seal(cell.run)
    return cell


@pytest.mark.parametrize("what", ["evaluation", "task", "run"])
def test_a_result_that_changed_is_refused_by_name(what: str, tmp_path: Path) -> None:
    cells = [fabricated(tmp_path, name, 0, 0.25, {"a": [1.0, 0.0]}) for name in (FULL_PRECISION, "gptq")]
    assert results.collect(cells)[1].kl_to_gptq == 1.0
    files = {"evaluation": cells[1].evaluation, "task": cells[1].task("a"), "run": cells[1].run / "summary.json"}
    text = files[what].read_text()
    files[what].write_text(text.replace("5", "4", 1))
    with pytest.raises(DamagedError, match=files[what].name):
        results.collect(cells)
    files[what].write_text(text)
    assert results.collect(cells)[1].kl_to_gptq == 1.0


def test_rows_hold_means_spreads_and_paired_recovery(tmp_path: Path) -> None:
    half, good = [1.0, 0.0] * 20, [1.0] * 30 + [0.0] * 10
    cells = [
        fabricated(tmp_path, FULL_PRECISION, 0, 0.0, {"a": good, "b": half}),
        fabricated(tmp_path, "gptq", 0, 0.2, {"a": good, "b": half}),
        fabricated(tmp_path, "gptq", 1, 0.4, {"a": good, "b": half}),
        fabricated(tmp_path, "latmix-lu", 0, 0.6, {"a": half, "b": [0.0] * 40}),
    ]
    full, gptq, ours = results.collect(cells)
    assert (
        gptq.kl is not None and gptq.kl.mean == pytest.approx(0.3) and gptq.kl.spread == pytest.approx(0.1414, abs=1e-4)
    )
    assert gptq.kl_to_gptq == pytest.approx(1.0) and ours.kl_to_gptq == pytest.approx(2.0) and full.kl_to_gptq is None
    assert gptq.zero_shot is not None and gptq.zero_shot.mean == pytest.approx(0.625)
    assert gptq.zero_shot.spread == pytest.approx(0.1 * 2**0.5 / 2)  # two tasks; seeds share their items
    assert gptq.tasks is not None and gptq.tasks["a"] == Figure(0.75, 0.1)
    # paired: the same items right in both models leave no doubt about the recovery
    assert gptq.recovery is not None
    assert (gptq.recovery.mean, gptq.recovery.low, gptq.recovery.high) == pytest.approx((1.0, 1.0, 1.0))
    assert ours.recovery is not None and ours.recovery.mean == pytest.approx((0.5 / 0.75 + 0) / 2)
    assert ours.recovery.low is not None and ours.recovery.low < ours.recovery.mean < (ours.recovery.high or 0)
    assert gptq.seconds is not None and gptq.seconds.mean == pytest.approx(3.5) and gptq.peak_bytes == 8
    assert results.ahead_of_ours([full, gptq, ours]) == ["gptq is ahead of latmix-lu in KL, at equal terms."]


def test_a_task_of_which_full_precision_has_nothing_right_has_no_recovery(tmp_path: Path) -> None:
    right, none = [1.0, 0.0] * 20, [0.0] * 40
    rows = {}
    for tasks in ({"a": right, "b": none}, {"b": none}):
        folder = tmp_path / str(len(tasks))
        cells = [fabricated(folder, FULL_PRECISION, 0, 0.0, tasks)]
        cells.append(fabricated(folder, "gptq", 0, 0.1, {**tasks, "b": right}))
        rows[len(tasks)] = results.collect(cells)
    both, alone = rows[2][1].recovery, rows[1][1].recovery
    assert both is not None and (both.mean, both.low, both.high) == (1.0, 1.0, 1.0) and alone is None
    assert "Recovery leaves out b: full precision has nothing right." in table.notes(rows[2])


def test_tables_show_what_rows_hold(tmp_path: Path) -> None:
    cells = [
        fabricated(tmp_path, name, 0, kl, {"a": [1.0, 0.0]}) for name, kl in ((FULL_PRECISION, 0.0), ("quarot", 0.25))
    ]
    rows = results.collect(cells)
    text = table.markdown(rows, "head")
    assert "| quarot | 0.250 (0.150–0.350) | 0.2500 (0.1500–0.3500) |" in text
    assert "| down: hadamard |" in text and "/ GPTQ" not in text  # no GPTQ, no column
    assert "| quarot | 50.0 ± 10.0 |" in text  # of the task alone
    values = table.as_csv(rows).splitlines()
    assert dict(zip(values[0].split(","), values[2].split(","), strict=True))["kl_mean"] == "0.25"


def test_every_form_of_the_table_has_time_memory_bits_online_operations_and_intervals(tmp_path: Path) -> None:
    items = {"a": [1.0, 0.0, 1.0] * 20, "b": [0.0, 1.0, 1.0] * 20}
    rows = results.collect([fabricated(tmp_path, n, 0, 0.25, items) for n in (FULL_PRECISION, "quarot")])
    console = rich.console.Console(width=80, file=io.StringIO(), color_system=None)
    console.print(table.terminal(rows, "title"))
    shown = console.file.getvalue()
    for text in (shown, table.markdown(rows, "head")):
        for word in (
            "recovery, %",
            "66.7 ± 7.1",
            "(100.0–100.0)",
            "(0.1500–0.3500)",
            " 4.25 ",
            "hadamard",
            "MiB",
            " 3 ",
        ):
            assert word in text, word
    (_, row), (_, flat) = (
        json.loads(json.dumps([dataclasses.asdict(row) for row in rows])),
        list(csv.DictReader(io.StringIO(table.as_csv(rows)))),
    )
    assert row["peak_bytes"] == int(flat["peak_bytes"]) == 7 and row["seconds"]["mean"] == float(flat["seconds_mean"])
    assert row["bits_per_weight"] == float(flat["bits_per_weight"]) and flat["online"] == "down: hadamard"
    assert row["kl"]["low"] == float(flat["kl_low"]) and row["recovery"]["high"] == float(flat["recovery_high"])
    assert row["tasks"]["b"]["spread"] == float(flat["tasks_b_spread"]) == 0.1


def test_a_bare_assertion_is_a_reason_all_the_same() -> None:
    try:
        assert len("longer") <= 2 - 1
    except AssertionError as error:
        error.args = ()
        assert _reason(error) == 'AssertionError: assert len("longer") <= 2 - 1'
