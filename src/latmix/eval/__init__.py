"""Measuring a model against text, and against the model it came from."""

from latmix.eval.errors import errors_of_layer
from latmix.eval.scores import Estimate, Scores, Scoring, bootstrap, score
from latmix.eval.size import Size, size_of

__all__ = ["Estimate", "Scores", "Scoring", "Size", "bootstrap", "errors_of_layer", "score", "size_of"]
