"""Measuring a model against text, and against the model it came from."""

from latmix.eval.errors import errors_of_run
from latmix.eval.scores import Estimate, Scores, bootstrap, score
from latmix.eval.size import Size, size_of

__all__ = ["Estimate", "Scores", "Size", "bootstrap", "errors_of_run", "score", "size_of"]
