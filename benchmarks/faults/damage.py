"""What spoils a job: damaged files, and numbers that make no sense. `count`: trials for each job there is."""

import shutil
from functools import partial
from pathlib import Path

import torch
from benchmarks.faults.campaign import CALIBRATED, STAGES, Campaign
from benchmarks.faults.stops import at_an_operation

import latmix
from latmix.export.folder import open_export
from latmix.rundir import SUMS, read_json


def damage(campaign: Campaign, files: list[Path]) -> tuple[Path, str]:
    """Cut a random file short, flip a bit of it, or lose it; which one, and what was done."""
    file = campaign.random.choice(sorted(file for file in files if file.stat().st_size))
    data, kind = bytearray(file.read_bytes()), campaign.random.choice(("cut short", "a bit flipped", "lost"))
    at = campaign.random.randrange(len(data))
    if kind == "lost":
        file.unlink()
    elif kind == "cut short":
        file.write_bytes(data[:at])
    else:
        data[at] ^= 1 << campaign.random.randrange(8)
        file.write_bytes(data)
    return file, kind


def damaged(campaign: Campaign, count: int) -> None:
    """What comes in, what is half done, what came out, what is served: each with a file damaged."""
    for _ in range(count * len(campaign.on(*campaign.works))):
        if campaign.time_left:
            for trial in (damaged_model, damaged_half, damaged_run, damaged_export):
                with campaign.fresh() as folder:
                    trial(campaign, folder)


def damaged_model(campaign: Campaign, folder: Path) -> None:
    """Refused, or taken for the other model that it may be."""
    model = Path(shutil.copytree(campaign.model, folder / "model"))
    _, kind = damage(campaign, list(model.iterdir()))
    child = campaign.start(partial(_quantize_rtn, model, folder / "out"), folder)
    child.end()
    campaign.note("damaged input: refused, or another model", "quantize, rtn", kind, child.sane, child)


def _quantize_rtn(model: Path, out: Path) -> None:
    latmix.quantize(model, out, "rtn", None, 0, CALIBRATED)


def damaged_half(campaign: Campaign, folder: Path) -> None:
    """A killed job of which a file is damaged before it goes on: refused by name, or no difference."""
    work, out = campaign.random.choice(campaign.works), folder / "out"
    at_an_operation(campaign, work, out)
    files = [
        file for file in folder.rglob("*") if file.is_file() and "out.partial" in file.parts and file.stat().st_size
    ]
    if out.exists() or not files:
        return
    file, kind = damage(campaign, files)
    child = campaign.start(work.job(out), folder)
    child.end()
    refused = child.code == 2 and "Traceback" not in child.words
    fine = refused or (child.code == 0 and campaign.same(work, out, child))
    campaign.note("damaged half-done output: refused, or no difference", work.name, kind, fine, child)
    if not fine:
        print(f"({file.name} {kind})")


def damaged_run(campaign: Campaign, folder: Path) -> None:
    """Refused by the name of the file."""
    run = Path(shutil.copytree(campaign.run, folder / "run"))
    file, kind = damage(campaign, list(run.iterdir()))
    child = campaign.start(campaign.evaluate(run)(folder / "out"), folder)
    named = child.end() == 2 and (file.name in child.words or SUMS in child.words)
    campaign.note("damaged run: refused by name", "evaluate", kind, named, child)


def damaged_export(campaign: Campaign, folder: Path) -> None:
    """Refused by the name of the file."""
    work = campaign.random.choice(campaign.exporting)
    served = Path(shutil.copytree(campaign.whole(work.name), folder / "served"))
    file, kind = damage(campaign, list(served.iterdir()))
    child = campaign.start(partial(open_export, served), folder)
    child.end()
    named = child.code == 2 and (file.name in child.words or SUMS in child.words)
    campaign.note("damaged export: refused by name", "open", kind, child.sane and named, child)


def bad_numbers(campaign: Campaign, count: int) -> None:
    """A rate far too large, and a loss that is NaN at one step: an error with advice, and nothing NaN is kept."""
    work = campaign.quantizing[0]
    for _ in range(count * len(campaign.on(*campaign.works))):
        if not campaign.time_left:
            return
        for stage in ("learning", "tuning"):
            with campaign.fresh() as folder:
                rate = {f"{stage}.lr": repr(10.0 ** campaign.random.uniform(0, 12))}
                child = campaign.start(campaign.quantize("latmix-plus", **rate)(folder / "out"), folder)
                advised = "smaller" in child.words if child.end() else finite(folder / "out")
                campaign.note("a rate from 1 to 10¹²", work.name, stage, child.sane and advised, child)
        with campaign.fresh() as folder:
            at = campaign.random.randrange(1, 12)
            child = campaign.start(work.job(folder / "out"), folder, partial(poison, at))
            fine = child.end() == 1 and "Traceback" not in child.words
            if fine:
                fine, child = campaign.goes_on(work, folder / "out")
            campaign.note("NaN in a batch", work.name, STAGES[1] if at <= 6 else STAGES[5], fine, child)


def finite(run: Path) -> bool:
    held_out = read_json(run / "summary.json")["held_out"]
    values = held_out["kl"]["mean"], held_out["perplexity"]["mean"]
    return all(value == value and abs(value) != float("inf") for value in values)


def poison(at: int) -> None:
    """The loss of the at-th backward pass is NaN."""
    original, left = torch.Tensor.backward, [at]

    def backward(self: torch.Tensor, *arguments: object, **options: object) -> None:
        left[0] -= 1
        original(self * float("nan") if left[0] == 0 else self, *arguments, **options)  # type: ignore[arg-type]

    torch.Tensor.backward = backward  # type: ignore[method-assign]
