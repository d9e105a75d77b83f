"""export, verify: from a run to a folder that an engine serves, and the proof that it does."""

from pathlib import Path
from typing import Annotated

import rich
import typer
from rich.table import Table

from latmix import export as exports
from latmix.cli.app import app
from latmix.cli.terminal import TerminalProgress
from latmix.errors import FailedError

Python = Annotated[
    str | None, typer.Option(help="Interpreter of the engine's environment; this one unless given.", metavar="PATH")
]


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    to: Annotated[
        str, typer.Option(help="compressed-tensors (vLLM), transformers or gguf (llama.cpp).")
    ] = "compressed-tensors",
    python: Python = None,
) -> None:
    """Write a run in the format of an engine, and verify it in that engine where it is installed."""
    with TerminalProgress() as progress:
        exports.export(run, to, out, progress)
        manifest = exports.open_export(out, progress)
    first, *others = manifest["engines"]
    here = [name for name in (first, *others) if exports.installed(name, to)]
    if python is not None or here:
        _verify(out, first if python else here[0], python)
    if python is None and first not in here:
        print(f"Not verified in {first}, which is not installed here. Run: latmix verify {out} --python PATH")
    command = exports.EXPORTS[to].serve(out, manifest["recipe"]["activations"])
    print(f"Serve it with:\n\n{command}\n\n{exports.caveats(manifest)}")


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What latmix export wrote.")],
    engine: Annotated[str | None, typer.Option(help="vllm, transformers or llama; the first that can.")] = None,
    python: Python = None,
) -> None:
    """Load an export in its engine and compare it with the run it came from; writes verdict.json."""
    _verify(folder, engine, python)


def _verify(folder: Path, engine: str | None, python: str | None) -> None:
    """Raises: LatmixError: engine and run disagree."""
    with TerminalProgress() as progress:
        verdict = exports.verify(folder, engine, python, progress)
    table = Table("measure", "engine", "run", title=f"{verdict.engine}: {'agrees' if verdict.passed else 'DISAGREES'}")
    table.add_row("perplexity", f"{verdict.perplexity:.4f}", f"{verdict.run_perplexity:.4f}")
    table.add_row("weights only", "", f"{verdict.run_weights_only:.4f}")
    table.add_row("KL to the run", f"{verdict.kl:.2e}", "")
    table.add_row("same greedy tokens", str(verdict.greedy), str(verdict.of))
    table.add_row("same tokenizer", "yes" if verdict.tokenizer else "no", "")
    rich.print(table)
    if not verdict.passed:
        raise FailedError(f"{verdict.engine} does not compute what the run computed; see '{folder}/verdict.json'.")
