"""What an export holds in memory, and what a killed one ends in: the same bytes as one that nothing disturbed.

    python benchmarks/export.py --out docs/results/export.md

Models of real shapes with random weights (benchmarks/scaling.py makes them), rounded to nearest without activations.
An export is a process of its own, without the verification that the command line adds. Memory: VmHWM, with the pages of
mapped files, and the largest anonymous part, sampled. Kills are SIGKILL, when the file of tensors has reached a share
of its size, and in the middle of the fingerprint; then the same export runs again. Every file is compared.
"""

import argparse
import contextlib
import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import scaling
import torch

import latmix
from latmix.export import EXPORTS
from latmix.export.folder import weight_of
from latmix.rundir import digest, read_json

CHILD = "import sys; from pathlib import Path; from latmix.export import export; "
CHILD += "export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))"
SHARES = (0.1, 0.5, 0.9)
Moment = Callable[[Path], bool]


def exported(run: Path, to: str, out: Path, moment: Moment | None = None) -> dict[str, float]:
    """One export, killed when `moment` says so of its unfinished folder. Bytes at most in memory, seconds."""
    began, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    partial = out.with_name(out.name + ".partial")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run), to, str(out)])
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith(tuple(peak))}
        peak = {key: max(value, found.get(key, 0)) for key, value in peak.items()}
        if moment is not None and moment(partial):
            child.kill()
        time.sleep(0.01)
    if child.returncode and moment is None:
        sys.exit(f"The export to '{to}' failed.")
    return {**peak, "seconds": time.perf_counter() - began}


def tensors(folder: Path) -> int:
    """Bytes of tensors in a folder, finished files and unfinished ones."""
    files = [*folder.glob("model*.safetensors"), *folder.glob(".model*.tmp"), *folder.glob("*.gguf")]
    with contextlib.suppress(FileNotFoundError):  # renamed while it was looked at
        return sum(file.stat().st_size for file in files)
    return 0


def content(folder: Path) -> dict[str, str]:
    return {file.name: digest(file) for file in folder.iterdir()}


def killed(run: Path, to: str, whole: Path, seconds: float) -> list[str]:
    """One line for each moment: whether the export that went on ends in the same files."""
    total, said = tensors(whole), []
    moments: dict[str, Moment] = {
        f"{share:.0%} of the tensors written": lambda partial, share=share: tensors(partial) > share * total
        for share in SHARES
    }
    moments["in the fingerprint"] = _after(total, seconds)
    for name, moment in moments.items():
        out = whole.with_name("export")  # the model card names its folder
        exported(run, to, out, moment)
        left = tensors(out.with_name("export.partial"))
        if out.exists():
            sys.exit(f"The export to '{to}' was done before it was killed ({name}).")
        exported(run, to, out)
        same = content(out) == content(whole)
        said.append(f"| {to} | {name} | {left:,} of {total:,} | {'the same' if same else '**different**'} |")
        print(said[-1], flush=True)
        shutil.rmtree(out)
    return said


def _after(total: int, seconds: float) -> Moment:
    """When all tensors have been there for a third of the time that a whole export takes."""
    since: list[float] = []

    def moment(partial: Path) -> bool:
        if not since and tensors(partial) >= total:
            since.append(time.perf_counter())
        return bool(since) and time.perf_counter() - since[0] > seconds / 3

    return moment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["0.5B", "1B"], help="the first one is killed, too")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--targets", nargs="*", default=list(EXPORTS))
    parser.add_argument("--folder", type=Path, default=Path("benchmark-runs/scaling"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    memory, kills = [], []
    for size in args.sizes:
        model = scaling.make(args.folder, size, args.layers)
        run = args.folder / f"export-{size}-{args.layers}"
        if not run.exists():
            latmix.quantize(model, run, "rtn", settings=scaling.SETTINGS)
        for to in args.targets:
            whole = args.folder / "whole"
            shutil.rmtree(whole, ignore_errors=True)
            took = exported(run, to, args.folder / "export")
            (args.folder / "export").rename(whole)
            bytes_ = weight_of(whole, read_json(whole / "latmix.json")).bytes
            layer = max(file.stat().st_size for file in run.glob("quantized-layer-*.safetensors"))
            cells = [f"{number / 2**20:.0f}" for number in (bytes_, layer, took["VmHWM"], took["RssAnon"])]
            memory.append(f"| {size}, {args.layers} layers | {to} | {' | '.join(cells)} | {took['seconds']:.0f} |")
            print(memory[-1], flush=True)
            if size == args.sizes[0]:
                kills += killed(run, to, whole, took["seconds"])
    about = f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}"
    command = shlex.join(["python", "benchmarks/export.py", *sys.argv[1:]])
    args.out.write_text(
        PAGE.format(about=about, command=command, memory="\n".join(memory), kills="\n".join(kills)), "utf-8"
    )


PAGE = """# Exports: memory, and what kills do

{about}. Other processes ran beside. Regenerate:

    {command}

Random weights, real shapes. "Layer": the largest layer's file in the run, 7.5 times as much in float32. "Resident"
counts the pages of mapped files, which the system may drop; "anonymous" is what has to be there, Python and its
packages included (about 300 MiB). All in MiB.

| model | target | tensors on disk | layer | resident, at most | anonymous, at most | seconds |
|---|---|---|---|---|---|---|
{memory}

SIGKILL, and the same command again; every file of the folder compared with those of an export that was left alone.
Bytes are those of the tensors that stood in the unfinished folder. A shard that is not finished is begun again, a GGUF
file too.

| target | killed | tensors there | result |
|---|---|---|---|
{kills}
"""

if __name__ == "__main__":
    main()
