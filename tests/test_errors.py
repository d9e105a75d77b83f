"""The tree of errors: its page is current, and the command line turns it into exit codes."""

import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latmix.cli import catalogue, main
from latmix.errors import DamagedError, DivergedError, InputError, LatmixError, WriteError, explained, tree

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_tree_says() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "errors_page.py"))["page"]()
    assert (ROOT / "docs" / "errors.md").read_text("utf-8") == page
    assert all(all(explained(kind)) for kind in tree())


def test_the_root_of_the_tree_is_never_raised() -> None:
    """What is raised says which kind it is; `type(error)(...)` says more about one that is."""
    raised = re.compile(r"raise LatmixError\b")
    assert not [file.name for file in (ROOT / "src").rglob("*.py") if raised.search(file.read_text("utf-8"))]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], int]]:
    """The exit code of `latmix list` when what it prints with does something else."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["latmix", "list"])

    def run(body: Callable[[], None]) -> int:
        monkeypatch.setattr(catalogue.rich, "print", lambda *_: body())
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    yield run
    signal.signal(signal.SIGTERM, before)


def fail(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("kind", "code"),
    [(InputError, 2), (DamagedError, 2), (WriteError, 1), (DivergedError, 1)],
    ids=lambda value: str(value),
)
def test_an_error_is_a_sentence_and_an_exit_code(
    kind: type[LatmixError], code: int, run: Callable[[Callable[[], None]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(fail(kind("The text 'x' is empty."))) == code
    assert (
        capsys.readouterr().err == f"latmix: The text 'x' is empty.\n({kind.__name__}; latmix list errors explains.)\n"
    )


def test_done_interrupted_and_terminated(run: Callable[[Callable[[], None]], int]) -> None:
    assert run(lambda: None) == 0
    assert run(fail(KeyboardInterrupt())) == 130
    assert run(lambda: signal.raise_signal(signal.SIGTERM)) == 143


def test_a_bug_keeps_its_traceback(run: Callable[[Callable[[], None]], int]) -> None:
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError()))


def test_what_is_listed_teaches(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["latmix", "list", "errors"])
    monkeypatch.setenv("COLUMNS", "400")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        main()
    signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().out
    assert "DamagedError" in said and "Remedy:" in said and "Exit code 1." in said
    assert "`latmix[eval]`" in said  # which rich would take for a style
