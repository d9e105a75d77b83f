"""The command line: words in, library calls, tables out. Few flags; everything else is a recipe key given to --set.

A command is a function in a file of this package that registers itself on `app`; the file is imported here.
"""

from latmix.cli import catalogue, compare, run
from latmix.cli.app import app, main

__all__ = ["app", "catalogue", "compare", "main", "run"]
