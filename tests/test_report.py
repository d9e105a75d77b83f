"""The report, as a page and in a browser: everything inside one file, nothing fetched, words for every picture."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import latmix
from latmix.analysis.report import names, report
from latmix.analysis.svg import Words, lines, nice_ticks, pairs
from latmix.errors import DamagedError
from latmix.seal import seal
from tests.test_pipeline import save_tiny, settings
from tests.texts import CALIBRATION


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    model = save_tiny(folder / "model")
    names = ("gptq", "latmix-lu")
    return [latmix.quantize(model, folder / name, name, CALIBRATION, 0, settings(name)).path for name in names]


class Outline(HTMLParser):
    """Tags in order, and whether every one that opens closes."""

    VOID = ("meta", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_file_with_words_for_every_picture(runs: list[Path], tmp_path: Path) -> None:
    page = report(runs, tmp_path / "report.html").read_text("utf-8")
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "<script" not in page
    pictures = [attributes for tag, attributes in outline.seen if tag == "svg"]
    assert len(pictures) == 5  # two learning curves; errors of either run, and block by block where there is a map
    assert all(len(str(attributes["aria-label"])) > 20 for attributes in pictures)
    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert f"{summary['held_out']['kl']['mean']:.4f}" in page
        assert summary["calibration"]["sha256"] in page
        assert set(summary["errors"]) == {f"{spot}/{i}" for spot in ("qkv", "o", "gate_up", "down") for i in range(2)}
    assert "qkv/1" in page and "condition number" in page
    assert page.count("; 3 that the model wrote itself, to learn from") == 1  # one of them learns


def test_errors_of_a_run_without_maps_are_the_same_before_and_after(runs: list[Path]) -> None:
    gptq, learned = (json.loads((run / "summary.json").read_text())["errors"] for run in runs)
    assert all(both["before"] == both["after"] for both in gptq.values())
    assert all(both["before"] != both["after"] for both in learned.values())
    assert len(gptq["down/0"]["before"]) == 3  # 96 elements in blocks of 32


def test_names_cannot_break_the_page(runs: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "<script>alert(1)<"
    odd.parent.mkdir(exist_ok=True)
    shutil.copytree(runs[0], odd)
    assert "<script" not in report([odd], tmp_path / "report.html").read_text("utf-8")


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(latmix.LatmixError, match="is not a run directory"):
        report([tmp_path], tmp_path / "report.html")
    (tmp_path / "kept.html").write_text("kept")
    with pytest.raises(latmix.LatmixError, match="exists; choose another"):
        report(runs, tmp_path / "kept.html")
    broken = Path(shutil.copytree(runs[0], tmp_path / "broken"))
    (broken / "summary.json").write_text("{}")
    seal(broken)  # by somebody who knows about the checksums
    with pytest.raises(latmix.LatmixError, match="damaged or of another version"):
        report([broken], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


SHOWN = ("recipe.json", "summary.json", "metrics.jsonl")


@pytest.mark.parametrize(
    ("name", "lost"), [*((name, lost) for name in SHOWN for lost in (False, True)), ("SHA256SUMS", True)]
)
def test_what_is_shown_is_what_was_written(name: str, lost: bool, runs: list[Path], tmp_path: Path) -> None:
    """A digit of a figure that changed, or a curve that went away, is no other result."""
    run = Path(shutil.copytree(runs[1], tmp_path / "run"))
    data = (run / name).read_bytes()
    digit = re.search(rb"[1-8]", data)
    assert digit is not None
    at = digit.start()
    (run / name).unlink() if lost else (run / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(DamagedError, match=f"'{name}' is missing" if lost else r"is damaged: its SHA-256 is not"):
        report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_runs_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    """As in a comparison, whose cells all hold a folder `run`."""
    cells = [Path(shutil.copytree(runs[1], tmp_path / f"latmix-lu-{seed}" / "run")) for seed in range(2)]
    page = report(cells, tmp_path / "report.html").read_text("utf-8")
    assert all(page.count(f'<li class="s{seed}">latmix-lu-{seed}</li>') == 2 for seed in range(2))
    assert names([Path("a/x/run"), Path("a/y/run"), Path("b/x/run")]) == ["a/x/run", "a/y/run", "b/x/run"]
    with pytest.raises(latmix.LatmixError, match="named twice"):
        report([cells[0], cells[0]], tmp_path / "twice.html")


def test_losses_of_different_kinds_share_no_chart(runs: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[1], tmp_path / "other"))
    recipe = json.loads((other / "recipe.json").read_text())
    recipe["learning"]["objective"] = "cross-entropy"
    (other / "recipe.json").write_text(json.dumps(recipe))
    seal(other)
    page = report([runs[1], other], tmp_path / "report.html").read_text("utf-8")
    assert len(re.findall('aria-label="Learning: KL of every batch. latmix-lu ends at [0-9.]+"', page)) == 1
    assert len(re.findall('aria-label="Learning: cross-entropy of every batch. other ends at [0-9.]+"', page)) == 1


def test_charts_hold_their_points_at_the_edges() -> None:
    chart = lines(Words("t", "x", "y", "d"), {"a": [(0, 0.0), (10, 3.0)], "one": [(5, 1.0)]})
    points = re.search(r'points="([^"]+)"', chart)
    assert points and points[1] == "78.0,198.0 416.0,12.0"
    rows = pairs(Words("t", "x", "y", "d"), ("a", "b"), {"one": (0.0, 2.0), "two": (1.0, 1.0)})
    assert re.findall(r'cx="([\d.]+)"', rows) == ["78.0", "416.0", "247.0", "247.0"]
    assert nice_ticks(0, 0.0437) == pytest.approx([0, 0.01, 0.02, 0.03, 0.04, 0.05])
    assert nice_ticks(2.0, 2.0) == [2.0, 3.0]


CUT_OFF = """Array.from(document.querySelectorAll("svg text")).filter(text => {
    const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
    const page = document.documentElement.clientWidth;
    return inner.left < outer.left - 1 || inner.right > outer.right + 1 || outer.right > page;
}).map(text => text.textContent)"""


@pytest.mark.parametrize("width", [375, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(width: int, scheme: str, runs: list[Path], tmp_path: Path) -> None:
    """Needs the extra `browser` and a Chromium on the path (or the one that playwright installs)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
    page_file = report(runs, tmp_path / "report.html")
    with playwright.sync_playwright() as play:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        if found is None and not Path(play.chromium.executable_path).exists():
            pytest.skip("no Chromium on this machine")
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        complaints, fetched = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(page_file.as_uri())
        assert not complaints
        assert [url for url in fetched if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(253, 253, 252)" if scheme == "light" else "rgb(21, 24, 27)")
        assert page.locator("svg").count() == 5 == page.get_by_role("img").count()
        assert page.evaluate(CUT_OFF) == []
        page.locator("summary").first.click()
        assert page.locator("details[open] table").first.is_visible()
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        browser.close()
