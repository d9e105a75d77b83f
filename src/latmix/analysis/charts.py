"""Pieces of a report: tables, charts with their numbers beside them, what a run's maps did to the error."""

from collections.abc import Mapping, Sequence
from html import escape

from latmix.analysis.svg import Words, heat, pairs


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(figure: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div>{figure}<details><summary>The numbers</summary>{table(head, rows)}</details></div>"


def errors(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """What the maps leave of the error: at every input, and in every block of it, where there is a map at all."""
    if not found:
        return ""
    means = {
        place: (sum(e["before"]) / len(e["before"]), sum(e["after"]) / len(e["after"])) for place, e in found.items()
    }
    ratios = {p: [a / b if b else 1.0 for a, b in zip(e["after"], e["before"], strict=True)] for p, e in found.items()}
    mapped = any(ratio != 1 for values in ratios.values() for ratio in values)
    before, after = (sum(values) for values in zip(*means.values(), strict=True))
    worst = max(means, key=lambda place: means[place][1])
    says = f"Over all inputs the maps leave {after / before:.2f} of the error; most is left" if mapped else "Most is"
    words = Words(
        "Error of the activations, before and after the maps" if mapped else "Error of the activations",
        "mean squared error / mean square",
        "of every input / layer",
        f"{says} at {worst}, {means[worst][1]:.4f}.",
    )
    rows = [[place, f"{b:.5f}", f"{a:.5f}"] for place, (b, a) in means.items()]
    kinds = ("before", "after") if mapped else ("there is no map",) * 2
    charts = chart(pairs(words, kinds, means), ("input / layer", "before", "after"), rows)
    if mapped:
        charts += _blocks(ratios)
    return f'<div class="charts">{charts}</div>'


def _blocks(ratios: Mapping[str, list[float]]) -> str:
    kept = [ratio for values in ratios.values() for ratio in values]
    says = f"From {min(kept):.2f} to {max(kept):.2f} of the error before; the rows are inputs, the columns blocks."
    words = Words("The same in every block", "block", "error after, divided by error before", says)
    rows = [[place, " ".join(f"{ratio:.2f}" for ratio in values)] for place, values in ratios.items()]
    return chart(heat(words, ratios), ("input / layer", "after / before, block by block"), rows)
