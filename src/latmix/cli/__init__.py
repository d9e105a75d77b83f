"""The command line: words in, library calls, tables out. Few flags; everything else is a recipe key given to --set.

A command is a function in a file of this package that registers itself on `app`; the file is imported here.
"""

from latmix.cli import analyze, catalogue, compare, export, run
from latmix.cli.app import app, main

__all__ = ["analyze", "app", "catalogue", "compare", "export", "main", "run"]
