"""Recipes side by side at equal terms: one calibration text, one quantizer, one evaluation, one table.

What is finished is on disk and never computed again, what failed says why, and a table can be made at any moment from
what is there: a comparison that was killed and started again ends in the same one.
"""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latmix.assets import CALIBRATION, EVALUATION
from latmix.comparison import table
from latmix.comparison.plan import Cell, Measures, cells, split_text
from latmix.comparison.pool import default_jobs, run_cells
from latmix.comparison.results import Row, collect
from latmix.errors import InputError
from latmix.progress import Logged, Progress
from latmix.ranks import launched_first
from latmix.rundir import LOG, write_json, write_text

TABLE = "table"


@dataclass(frozen=True)
class Texts:
    """Where texts come from: `calibration` and `text` (the package's own unless given), or `text` alone and `split`,
    the share of its documents to calibrate on. Documents are told apart by `separator`."""

    calibration: Path | None = None
    text: Path | None = None
    split: float | None = None
    separator: str | None = None

    def files(self, out: Path) -> tuple[Path, Path]:
        """(calibration, evaluation).

        Raises: LatmixError: a split without a text, or of two texts.
        """
        if self.split is None:
            return self.calibration or CALIBRATION, self.text or EVALUATION
        if self.text is None or self.calibration is not None:
            raise InputError("A split needs a text, and no calibration text beside it.")
        return split_text(self.text, self.separator or "\n\n", self.split, out)


def compare(
    model: Path | str,
    names: Sequence[str],
    out: Path | str,
    *,
    seeds: int = 1,
    texts: Texts | None = None,
    window: int | None = None,
    tasks: Sequence[str] = (),
    task_data: Path | str | None = None,
    task_options: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    jobs: int | None = None,
    head: str = "",
    progress: Progress | None = None,
) -> list[Row]:
    """Run or resume the recipes on `model`, seeds 0 … seeds − 1, and write table.md, table.csv and table.json to `out`.

    A recipe in which nothing is random is computed once. The processes of `torchrun` share the cells; the first writes
    the table and returns it, for the others this call ends the program.

    Args:
        names: presets or JSON files.
        window: tokens in a window, of calibration and evaluation alike; each one's own default unless given.
        tasks, task_data, task_options: see `Measures`.
        settings: recipe keys to replace, in every recipe that has the part they belong to.
        jobs: cells computed at the same time; one for each GPU unless given, else one.
        head: stands above the table in table.md.

    Raises: LatmixError: bad input, in one sentence. A cell that fails does not raise: its row says why.
    """
    out, texts, settings, progress = Path(out), texts or Texts(), dict(settings or {}), progress or Progress()
    calibration, text = texts.files(out)
    if texts.separator is not None:
        settings["calibration.separator"] = texts.separator
    if window is not None:
        settings["calibration.window"] = str(window)
    data = None if task_data is None else str(task_data)
    measures = Measures(str(text), texts.separator, window, tuple(tasks), data, dict(task_options or {}))
    planned = cells(Path(model), names, out, seeds, calibration, measures, settings)
    before = {cell.folder for cell in planned if cell.finished}
    out.mkdir(parents=True, exist_ok=True)
    progress = Logged(progress, out / LOG) if launched_first() else Progress()
    progress.stage("cells", len(planned), len(before))

    def done(cell: Cell) -> None:
        if cell.folder not in before:
            progress.advance(f"{cell.name}, seed {cell.seed}: {'done' if cell.finished else 'failed'}")
            _write(planned, out, head)

    run_cells(planned, jobs or default_jobs(), done)
    if not launched_first():
        raise SystemExit(0)
    return _write(planned, out, head)


def _write(planned: list[Cell], out: Path, head: str) -> list[Row]:
    """Dated by the newest cell, not by today: what did not change is written as it was."""
    rows = collect(planned)
    times = [cell.evaluation.stat().st_mtime for cell in planned if cell.finished]
    dated = f"{head}\nMeasured {datetime.date.fromtimestamp(max(times))}.\n" if times else head
    write_text(out / f"{TABLE}.md", table.markdown(rows, dated))
    write_text(out / f"{TABLE}.csv", table.as_csv(rows))
    write_json(out / f"{TABLE}.json", [dataclasses.asdict(row) for row in rows])
    return rows


__all__ = ["Measures", "Row", "Texts", "compare"]
