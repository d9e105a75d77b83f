"""The program: its help, its exit codes. Commands live in the files beside this one and register themselves here."""

import sys

import transformers
import typer

from latmix.errors import LatmixError

app = typer.Typer(
    name="latmix",
    help="Turn a Hugging Face language model into a 4-bit microscaling (MX) model that keeps its accuracy.",
    epilog="Start with: latmix demo. Then: latmix quantize MODEL --out RUN, latmix evaluate RUN --text FILE. "
    "The guide is in docs/; make docs builds it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Exit codes: 0 done, 1 a comparison with failed cells, 2 bad input or usage, 130 interrupted."""
    transformers.utils.logging.disable_progress_bar()  # ours is the only bar
    try:
        app()
    except LatmixError as error:
        print(f"latmix: {error}", file=sys.stderr)
        sys.exit(2)
