"""Weight quantizers: a weight, the moments of its inputs and a format in; codes and scales out."""

from latmix.weights.base import WEIGHT_QUANTIZERS, MoreDamping, WeightQuantizer, parse_quantizer, proxy_loss
from latmix.weights.gptaq import GPTAQ
from latmix.weights.gptq import GPTQ
from latmix.weights.rtn import RTN

__all__ = [
    "GPTAQ",
    "GPTQ",
    "RTN",
    "WEIGHT_QUANTIZERS",
    "MoreDamping",
    "WeightQuantizer",
    "parse_quantizer",
    "proxy_loss",
]
