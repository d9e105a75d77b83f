"""latmix: 4-bit microscaling (MX) language models that keep their accuracy: learned affine maps, arXiv 2602.17681."""

from latmix import packed as _packed  # noqa: F401  (registers the quantizer with transformers)
from latmix.errors import LatmixError
from latmix.evaluation import Evaluation, evaluate
from latmix.numerics import decode, encode, fake_quant
from latmix.pipeline import Run, quantize
from latmix.recipe import Recipe

__all__ = ["Evaluation", "LatmixError", "Recipe", "Run", "decode", "encode", "evaluate", "fake_quant", "quantize"]
