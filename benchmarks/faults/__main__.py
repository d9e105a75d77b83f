"""python -m benchmarks.faults: see the package."""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; a process with threads is not forked
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch  # noqa: E402
from benchmarks.faults.campaign import RECIPES, Campaign  # noqa: E402
from benchmarks.faults.damage import bad_numbers, damaged  # noqa: E402
from benchmarks.faults.stops import full_disk, kills, signals, together  # noqa: E402

from latmix.compiled import library  # noqa: E402
from latmix.numerics import native  # noqa: E402
from latmix.transforms import hadamard  # noqa: E402

FAULTS = {fault.__name__: fault for fault in (signals, full_disk, together, damaged, bad_numbers)}


def page(campaign: Campaign, arguments: list[str], minutes: float) -> str:
    tried, survived = campaign.tried, campaign.survived
    rows = [" | ".join(("", *key, f"{tried[key]:,}", f"{survived[key]:,}", "")).strip() for key in sorted(tried)]
    killed = sum(count for (fault, *_), count in tried.items() if fault.startswith("SIGKILL"))
    head = f"""# Faults

{survived.total():,} of {tried.total():,} trials survived, {killed:,} of them kills ({datetime.date.today()},
{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {minutes:.0f} minutes). A tiny
random Llama; recipes {", ".join(RECIPES)}. After a kill, a signal, a full disk or NaN the same command went
on and ended in the same bytes as an undisturbed one, times aside. Regenerate:

    python -m benchmarks.faults {" ".join(arguments)}

| fault | job | while | tried | survived |
|---|---|---|---|---|
"""
    return "\n".join([head.rstrip(), *rows, f"| all | | | {tried.total():,} | {survived.total():,} |"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="of all: a minute instead of half an hour")
    parser.add_argument("--jobs", nargs="*", default=[""], help="only jobs whose names hold one of these words")
    parser.add_argument("--kills", type=int, default=1, help="kills of each job, at a moment and at a file operation")
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS, help="the other faults; all of them")
    parser.add_argument("--others", type=int, default=1, help="trials of every other fault on each job")
    parser.add_argument("--minutes", type=float, default=1000.0, help="begin no trial later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the table here")
    wish = parser.parse_args()
    torch.set_num_threads(1)
    for kernels in (native.SOURCE, hadamard.SOURCE):
        library(kernels)  # compiled once, here, and not in every child
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), wish.seed, wish.minutes, wish.sample)
        campaign.works = [work for work in campaign.works if any(word in work.name for word in wish.jobs)]
        kills(campaign, wish.kills)
        for name in wish.faults:
            FAULTS[name](campaign, wish.others)
    print(text := page(campaign, sys.argv[1:], (time.monotonic() - began) / 60))
    if wish.out:
        wish.out.write_text(text, "utf-8")
    return 0 if campaign.tried == campaign.survived else 1


if __name__ == "__main__":
    sys.exit(main())
