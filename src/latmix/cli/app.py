"""The program: its help, its exit codes. Commands live in the files beside this one and register themselves here."""

import signal
import sys

import transformers
import typer

from latmix.errors import LatmixError

app = typer.Typer(
    name="latmix",
    help="Turn a Hugging Face language model into a 4-bit microscaling (MX) model that keeps its accuracy.",
    epilog="Start with: latmix demo. Then: latmix quantize MODEL --out RUN, latmix evaluate RUN --text FILE. "
    "The guide is in docs/; make docs builds it. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted, "
    "143 terminated; latmix list errors explains.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Exit codes: 0 done; 1 the work failed, or a comparison has failed cells; 2 bad input or usage; 130 Ctrl-C; 143
    SIGTERM. An exception that is no `LatmixError` is a bug: it keeps its traceback. But not after a signal: a library
    that it met in the middle (torch, reading a tensor) makes an error of its own of it."""
    transformers.utils.logging.disable_progress_bar()  # ours is the only bar
    stopped_by: list[int] = []

    def stop(number: int, _: object) -> None:
        """As an exception, so that what is open is closed."""
        stopped_by.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        app()
    except Exception as error:
        if stopped_by:
            print("Aborted.", file=sys.stderr)
            sys.exit(128 + stopped_by[0])
        if not isinstance(error, LatmixError):
            raise
        print(f"latmix: {error}\n({type(error).__name__}; latmix list errors explains.)", file=sys.stderr)
        sys.exit(error.exit_code)
