"""What quantizing layer by layer costs in memory and time against the size of the model.

    python benchmarks/scaling.py [--calibrated] [--sizes 0.5B 1B:12 …] [--vocabulary N] [--folder DIR] [--json FILE]

Checkpoints of real shapes with random weights, in bfloat16 shards, are made once in --folder; `1B:12` has 12 layers of
a 1B model. Each is quantized by `rtn` and by `block-hadamard` with weights rounded to nearest, each in a process of its
own: read, maps folded, weights rounded, shards written, no activation computed; with --calibrated by `block-hadamard`
and GPTQ on 8 windows of 128 tokens, and measured on 8 more.
Reported, as a table of docs/results/scaling.md: the largest resident memory that the kernel saw (VmHWM: with the pages
of mapped files, which are the checkpoint's own and can be dropped), the largest anonymous part of it (sampled every
20 ms: what really has to be there), seconds by the clock and of the processor, seconds for embedding and head, for the
layers, and for the rest (checksums of the original, and preparation), and the exponents p of cost ∝ size^p. Beside
rounding to nearest stand two limits, measured just before on the same disk: reading every byte of the checkpoint once,
and copying it, until the copy is on the disk. Before each of them, and before every run, the checkpoint's pages are put
out of the page cache; what a run reads a second time may come from there.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

import latmix
from latmix.assets import DEMO_MODEL
from latmix.model.load import load_tokenizer
from latmix.model.shards import stored_tensors
from latmix.model.source import skeleton
from latmix.model.tensors import Rows, write

SHAPES = {  # hidden, intermediate, layers, heads, KV heads; the vocabulary is Llama 3's, the head untied
    "135M": (576, 1536, 30, 9, 3),
    "0.5B": (1024, 4096, 16, 16, 4),
    "1B": (2048, 8192, 16, 32, 8),
    "3B": (3072, 8192, 28, 24, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
VOCABULARY, SEED, POOL = 128256, 0, 2**26
ROOM = 2**22  # bytes in memory while the checkpoint is read
ROUNDED = {"quantizer": "rtn", "calibration.held_out": "0", "calibration.windows": "1", "calibration.window": "32"}
CALIBRATED = {"calibration.held_out": "8", "calibration.windows": "8", "calibration.window": "128"}
MIB = 2**20


def make(folder: Path, size: str, vocabulary: int) -> Path:
    """The checkpoint, a shard a layer; every tensor is a stretch of one pool of random numbers."""
    name, _, depth = size.partition(":")
    hidden, intermediate, count, heads, kv = SHAPES[name]
    count = int(depth or count)
    path = folder / f"{name}-{count}-{vocabulary}"
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=count,
        num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(SEED)
    pool = torch.randn(POOL, generator=generator).mul_(0.02).bfloat16()
    shards: dict[str, dict[str, Rows | torch.Tensor]] = {}
    for name, parameter in skeleton(path, config).named_parameters():
        parts = name.split(".")
        shard = f"model-{parts[2] if 'layers' in parts else parts[-2]}.safetensors"
        gain = torch.ones(parameter.shape, dtype=torch.bfloat16)
        shards.setdefault(shard, {})[name] = gain if parameter.ndim == 1 else stretch(parameter.shape, pool, generator)
    for shard, tensors in shards.items():
        write(path / shard, tensors, {})
    places = {name: shard for shard, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    load_tokenizer(DEMO_MODEL).save_pretrained(path)
    config.save_pretrained(path)
    return path


def stretch(shape: torch.Size, pool: torch.Tensor, generator: torch.Generator) -> Rows:
    step = min(shape[0], len(pool) // 2 // shape[1])
    at = int(torch.randint(len(pool) // 2, (), generator=generator))
    block = pool[at : at + step * shape[1]].view(step, shape[1])
    return Rows(tuple(shape), torch.bfloat16, (block[: shape[0] - begin] for begin in range(0, shape[0], step)))


def memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "RssAnon"))}


def cold(model: Path) -> list[Path]:
    """The checkpoint's shards, none of them in the page cache."""
    shards = sorted(model.glob("*.safetensors"))
    for shard in shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return shards


def limits(model: Path, to: Path) -> dict[str, float]:
    """Seconds in which every byte is read from the disk once, and in which a copy is on the disk."""
    room, shards, began = memoryview(bytearray(ROOM)), cold(model), time.perf_counter()
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    reading, shards = time.perf_counter() - began, cold(model)
    to.mkdir()
    began = time.perf_counter()
    copies = [Path(shutil.copyfile(shard, to / shard.name)) for shard in shards]
    for copy in copies:
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    copying = time.perf_counter() - began
    shutil.rmtree(to)
    return {"reading": reading, "copying": copying}


def child(model: Path, out: Path, recipe: str, settings: dict[str, str]) -> None:
    """One run, and what it needed, as a line of JSON."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], memory()["RssAnon"])

    Path("/proc/self/clear_refs").write_text("5")
    before = memory()
    watcher = threading.Thread(target=watch)
    watcher.start()
    began, worked = time.perf_counter(), time.process_time()
    run = latmix.quantize(model, out, recipe, seed=SEED, settings=settings)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    over.set()
    watcher.join()
    stages = run.summary["stages"]
    found = {
        "resident": max(stage["peak_bytes"] for stage in stages.values()),
        "anonymous": peak[0],
        "idle": before["RssAnon"],
        "seconds": seconds,
        "processor": worked,
        "stages": {name: stage["seconds"] for name, stage in stages.items()},
        "peaks": {name: stage["peak_bytes"] for name, stage in stages.items()},
    }
    print("RESULT " + json.dumps(found))


def measure(model: Path, out: Path, recipe: str, *flags: str) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    cold(model)
    command = [sys.executable, __file__, *flags, "--child", str(model), str(out), recipe]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(out)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    stored = stored_tensors(model).values()
    found: dict[str, Any] = {"parameters": sum(math.prod(tensor.shape) for tensor in stored)}
    return found | json.loads(line.removeprefix("RESULT "))


def exponent(results: list[dict[str, Any]], key: str) -> float:
    """Slope of log cost over log size, by least squares."""
    x = torch.tensor([math.log(r["parameters"]) for r in results], dtype=torch.float64)
    y = torch.tensor([math.log(r[key]) for r in results], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


STAGES = {"fold": "tables", "quantize": "layers"}
ROUNDED_TABLE = ("shape", "recipe", "parameters", "resident, MiB", "anonymous, MiB", "seconds", "of the processor",
                 *STAGES.values(), "checksums, rest", "read", "times that", "copy", "times that")  # fmt: skip
WORK = {"fold": "folding", "quantize": "quantizing", "measure": "measuring"}
CALIBRATED_TABLE = ("shape", "parameters", "resident, MiB", "anonymous, MiB", *WORK.values(), "seconds", *WORK.values())


def rounded_row(size: str, recipe: str, found: dict[str, Any]) -> list[str]:
    stages = [found["stages"][name] for name in STAGES]
    times = [found["seconds"], found["processor"], *stages, found["seconds"] - sum(stages)]
    words = [*_memory(found), *(f"{seconds:.1f}" for seconds in times)]
    for limit in (found["reading"], found["copying"]):
        words += [f"{limit:.1f}", f"{found['seconds'] / limit:.2f}"]
    return [size, recipe, f"{found['parameters'] / 1e9:.2f} · 10⁹", *words]


def calibrated_row(size: str, found: dict[str, Any]) -> list[str]:
    peaks = [f"{found['peaks'][name] / MIB:.0f}" for name in WORK]
    times = [f"{seconds:.0f}" for seconds in (found["seconds"], *(found["stages"][name] for name in WORK))]
    return [size, f"{found['parameters'] / 1e9:.3f} · 10⁹", *_memory(found), *peaks, *times]


def _memory(found: dict[str, Any]) -> list[str]:
    return [f"{found[key] / MIB:.0f}" for key in ("resident", "anonymous")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["0.5B", "1B", "3B", "8B"], help=f"of {', '.join(SHAPES)}; 1B:12 with 12 layers"
    )
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--calibrated", action="store_true", help="GPTQ instead of rounding to nearest")
    parser.add_argument("--folder", type=Path, default=Path("scaling"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, out, recipe = options.child
        child(Path(model), Path(out), recipe, CALIBRATED if options.calibrated else ROUNDED)
        return
    flags, recipes = (["--calibrated"], ["block-hadamard"]) if options.calibrated else ([], ["rtn", "block-hadamard"])
    columns = CALIBRATED_TABLE if options.calibrated else ROUNDED_TABLE
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    results = []
    for size in options.sizes:
        model = make(options.folder, size, options.vocabulary)
        alone = {} if options.calibrated else limits(model, options.folder / "copy")
        for recipe in recipes:
            found = alone | measure(model, options.folder / "run", recipe, *flags)
            results.append({"size": size, "recipe": recipe, **found})
            row = calibrated_row(size, found) if options.calibrated else rounded_row(size, recipe, found)
            print(f"| {' | '.join(row)} |", flush=True)
    for recipe in recipes if len(options.sizes) > 1 else []:
        mine = [found for found in results if found["recipe"] == recipe]
        words = ", ".join(f"{key} {exponent(mine, key):.2f}" for key in ("resident", "anonymous", "seconds"))
        print(f"{recipe}: exponent of the growth: {words}")
    print(f"seed {SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
