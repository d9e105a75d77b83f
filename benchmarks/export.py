"""What an export holds in memory.

    python benchmarks/export.py --out docs/results/export.md

Models of real shapes with random weights (benchmarks/scaling.py makes them), rounded to nearest without activations.
An export is a process of its own, without the verification that the command line adds, and with a fingerprint of one
window and one greedy token instead of 8 and 24, which is what takes the time. Windows go through a layer together:
eight held 250 MiB more at 0.5B (docs/log.md); greedy tokens come one after the other. Memory: VmHWM, with the pages of
mapped files, and the largest anonymous part, sampled. What kills do to exports: `python -m benchmarks.faults`.
"""

import argparse
import datetime
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import scaling
import torch

import latmix
from latmix.export import EXPORTS
from latmix.export.folder import weight_of
from latmix.rundir import read_json

CHILD = "import sys; from pathlib import Path; from latmix.export import export, fingerprint; "
CHILD += "fingerprint.WINDOWS = fingerprint.CONTINUE = 1; export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))"


def exported(run: Path, to: str, out: Path) -> dict[str, float]:
    """One export: bytes in memory at most, seconds."""
    began, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run), to, str(out)])
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith(tuple(peak))}
        peak = {key: max(value, found.get(key, 0)) for key, value in peak.items()}
        time.sleep(0.01)
    if child.returncode:
        sys.exit(f"The export to '{to}' failed.")
    return {**peak, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["0.5B", "1B"])
    parser.add_argument("--layers", nargs="*", type=int, default=[2, 8])
    parser.add_argument("--targets", nargs="*", default=list(EXPORTS))
    parser.add_argument("--folder", type=Path, default=Path("benchmark-runs/scaling"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    memory = []
    for size, layers in itertools.product(args.sizes, args.layers):
        model = scaling.make(args.folder, size, layers)
        run = args.folder / f"export-{size}-{layers}"
        if not run.exists():
            latmix.quantize(model, run, "rtn", settings=scaling.SETTINGS)
        for to in args.targets:
            whole = args.folder / "export"
            shutil.rmtree(whole, ignore_errors=True)
            took = exported(run, to, whole)
            bytes_ = weight_of(whole, read_json(whole / "latmix.json")).bytes
            layer = max(file.stat().st_size for file in run.glob("quantized-layer-*.safetensors"))
            cells = [f"{number / 2**20:.0f}" for number in (bytes_, layer, took["VmHWM"], took["RssAnon"])]
            memory.append(f"| {size}, {layers} layers | {to} | {' | '.join(cells)} | {took['seconds']:.0f} |")
            print(memory[-1], flush=True)
    about = f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}"
    command = shlex.join(["python", "benchmarks/export.py", *sys.argv[1:]])
    args.out.write_text(PAGE.format(about=about, command=command, memory="\n".join(memory)), "utf-8")


PAGE = """# What an export holds in memory

{about}. Regenerate:

    {command}

Random weights, real shapes, a vocabulary of 128,256. "Layer": the largest layer's file in the run, 7.5 times as much in
float32. "Resident" counts the pages of mapped files, which the system may drop; "anonymous" is what has to be there,
Python and its packages included (about 300 MiB). All in MiB. Seconds are with one window and one greedy token
in the fingerprint; the command line takes 8 and 24, each token another pass over the layers.

| model | target | tensors on disk | layer | resident, at most | anonymous, at most | seconds |
|---|---|---|---|---|---|---|
{memory}
"""

if __name__ == "__main__":
    main()
