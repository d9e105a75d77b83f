"""Charts as inline SVG, made by hand: no script, no font, no colour that the page does not choose.

Every chart has a title and a description for those who do not see it, and stands beside a table of its numbers. Colours
are CSS classes (`s0` … `s5`), so that light and dark are the page's business. Given up: interaction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 240, 78, 24, 12, 42  # readable at the width of a phone, unscrolled
ROW = 18  # height of a named row
SERIES = 6  # colours; more series start over with dashes

Number = int | float
Points = Sequence[tuple[Number, Number]]


@dataclass(frozen=True)
class Words:
    """What a chart says in words: heading, axes, and a sentence for those who do not see it."""

    title: str
    x: str
    y: str
    description: str


def lines(words: Words, series: Mapping[str, Points]) -> str:
    """A line chart with a legend."""
    every = [point for points in series.values() for point in points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    low_y, high_y = min(0.0, *(y for _, y in every)), max(y for _, y in every)
    ticks = nice_ticks(low_y, high_y)
    high_y = max(high_y, ticks[-1])

    def place(x: Number, y: Number) -> tuple[float, float]:
        across = (x - low_x) / ((high_x - low_x) or 1)
        up = (y - low_y) / ((high_y - low_y) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        _, y = place(low_x, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in nice_ticks(low_x, high_x):
        x, _ = place(tick, low_y)
        if low_x <= tick <= high_x:
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    for number, points in enumerate(series.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        dashes = ' stroke-dasharray="6 4"' if number >= SERIES else ""
        parts.append(f'<polyline class="line s{number % SERIES}"{dashes} points="{path}"/>')
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle class="dot s{number % SERIES}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    middle = (WIDTH + LEFT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(words.x)}</text>')
    kinds = {name: f"s{n % SERIES}{' dashed' if n >= SERIES else ''}" for n, name in enumerate(series)}
    return _figure(words, "".join(parts), HEIGHT, kinds)


def pairs(words: Words, names: tuple[str, str], rows: Mapping[str, tuple[float, float]]) -> str:
    """Two values a row, a dot each, joined: where each row's first value went."""
    ticks = nice_ticks(0.0, max(max(pair) for pair in rows.values()))
    scale, bottom = (WIDTH - LEFT - RIGHT) / ticks[-1], TOP + len(rows) * ROW
    parts = []
    for tick in ticks:
        x = LEFT + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:.3g}</text>')
    for number, (name, pair) in enumerate(rows.items()):
        y, (first, second) = TOP + (number + 0.5) * ROW, (LEFT + value * scale for value in pair)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<line class="way" x1="{first:.1f}" x2="{second:.1f}" y1="{y}" y2="{y}"/>')
        parts += [f'<circle class="dot s{i}" cx="{x:.1f}" cy="{y}" r="4"/>' for i, x in enumerate((first, second))]
    total = bottom + BOTTOM
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{total - 8}" text-anchor="middle">{escape(words.x)}</text>')
    return _figure(words, "".join(parts), total, {name: f"s{i}" for i, name in enumerate(names)})


def heat(words: Words, rows: Mapping[str, Sequence[float]]) -> str:
    """Cells by row and column: below one (better) in one colour, above one in another, the stronger the farther."""
    columns = max(len(values) for values in rows.values())
    width = (WIDTH - LEFT - RIGHT) / columns
    parts = []
    for number, (name, values) in enumerate(rows.items()):
        y = TOP + number * ROW
        parts.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(values):
            kind, strength = ("better", 1 - value) if value < 1 else ("worse", value - 1)
            x, opacity = LEFT + column * width, min(1.0, max(0.04, strength))
            parts.append(
                f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" '
                f'fill-opacity="{opacity:.2f}"><title>{escape(name)}, block {column}: {value:.2f}</title></rect>'
            )
    total = TOP + len(rows) * ROW + 24
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{total - 6}" text-anchor="middle">{escape(words.x)}</text>')
    return _figure(words, "".join(parts), total, {"smaller than without a map": "better", "larger": "worse"})


def _figure(words: Words, content: str, height: int, legend: Mapping[str, str]) -> str:
    """`legend`: name → CSS class."""
    items = "".join(f'<li class="{kind}">{escape(name)}</li>' for name, kind in legend.items())
    return (
        f"<figure><figcaption>{escape(words.title)} <small>{escape(words.y)}</small></figcaption>"
        f'<svg role="img" viewBox="0 0 {WIDTH} {height}" '
        f'aria-label="{escape(words.title)}. {escape(words.description)}">'
        f"<title>{escape(words.title)}</title><desc>{escape(words.description)}</desc>{content}</svg>"
        f'<ul class="legend">{items}</ul></figure>'
    )


def nice_ticks(low: Number, high: Number, wanted: int = 5) -> list[float]:
    """Round numbers that cover low … high."""
    if not high > low:
        return [float(low), float(low + 1)]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.floor(low / step)
    return [step * k for k in range(first, math.ceil(high / step - 1e-9) + 1)]
