"""Figures of an analysis, as PNG and SVG, from its CSV files alone. Needs matplotlib (the extra `plots`).

Four figures: errors (E(T) by block size; Figure 2a of the paper), perplexity (by block size; 2b), blocks (E_B of every
block; 2c) and amplitudes (the distribution before and after).
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latmix.errors import InputError, UnavailableError

COLOURS = ("#3b6ea8", "#c8553d", "#4f9d69", "#8a63a8", "#b8860b", "#5b8c9b", "#7a5c43", "#b5577f")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot(folder: Path) -> list[Path]:
    """Draw every figure beside its data; returns the files.

    Raises: LatmixError: no matplotlib, or no analysis there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UnavailableError(
            "Figures need matplotlib: pip install 'latmix[plots]'. The CSV files are complete."
        ) from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "latmix", "svg.fonttype": "none", "font.size": 9})  # words stay words
    matplotlib.rcParams["axes.spines.top"] = False
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    files = []
    for name, draw in FIGURES.items():
        files += _draw(folder, name, draw)
    return files


def _draw(folder: Path, name: str, draw: Callable[[Any, list[dict[str, str]]], None]) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, read_csv(folder / f"{name}.csv"))
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(files[0], dpi=110)
    figure.savefig(files[1], metadata={"Date": None})
    return files


def read_csv(path: Path) -> list[dict[str, str]]:
    """Raises: LatmixError: missing."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}.") from error


def _curves(axes: Any, rows: list[dict[str, str]], x: str, y: str) -> None:
    for number, name in enumerate(dict.fromkeys(row["map"] for row in rows)):
        points = [(float(row[x]), float(row[y])) for row in rows if row["map"] == name]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "markersize": 4}
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, **style)


def _errors(axes: Any, rows: list[dict[str, str]]) -> None:
    _curves(axes, rows, "block", "error")
    axes.set(xscale="log", xlabel="block size", ylabel="E(T)", title="Error left by a map, by block size")
    axes.set_xticks(blocks := sorted({int(row["block"]) for row in rows}), blocks, minor=False)
    axes.minorticks_off()


def _perplexity(axes: Any, rows: list[dict[str, str]]) -> None:
    original, rows = float(rows[0]["perplexity"]), rows[1:]
    _curves(axes, rows, "block", "perplexity")
    axes.axhline(original, color="#777777", linewidth=1, linestyle="--", label="unquantized")
    axes.set(xscale="log", xlabel="block size", ylabel="perplexity", title="Perplexity, the site's inputs quantized")
    axes.set_xticks(blocks := sorted({int(row["block"]) for row in rows}), blocks, minor=False)
    axes.minorticks_off()


def _blocks(axes: Any, rows: list[dict[str, str]]) -> None:
    _curves(axes, rows, "block", "error")
    axes.set(xlabel="block of the activation", ylabel="$E_B(T)$", title="Error in each block", ylim=(0, None))
    axes.set_xticks(sorted({int(row["block"]) for row in rows}))


def _amplitudes(axes: Any, rows: list[dict[str, str]]) -> None:
    shown = ("none", "block-hadamard", "learned-rotation", "learned-affine")
    _curves(axes, [row for row in rows if row["map"] in shown and float(row["share"]) > 0], "low", "share")
    title = "Amplitudes before and after"
    axes.set(xscale="log", yscale="log", xlabel="|y| / rms", ylabel="share of elements", title=title)


FIGURES = {"errors": _errors, "perplexity": _perplexity, "blocks": _blocks, "amplitudes": _amplitudes}
