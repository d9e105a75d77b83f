"""Block formats: what they are, how a block's scale is chosen, fake quantization, and codes."""

from latmix.numerics.codes import Quantized, decode, encode, neighbours, pack, unpack
from latmix.numerics.columns import round_columns
from latmix.numerics.fakequant import fake_quant, fake_quant_with_scale_gradient, quantize_with_scales
from latmix.numerics.formats import ELEMENTS, FORMATS, ROUNDINGS, SCALE_RULES, BlockFormat, Element, parse_format
from latmix.numerics.rotated import rotate_blocks, rotated_fake_quant
from latmix.numerics.rounding import round_to_element
from latmix.numerics.scales import choose_scales, choose_tensor_scale, decode_scales, encode_scales

__all__ = [
    "ELEMENTS",
    "FORMATS",
    "ROUNDINGS",
    "SCALE_RULES",
    "BlockFormat",
    "Element",
    "Quantized",
    "choose_scales",
    "choose_tensor_scale",
    "decode",
    "decode_scales",
    "encode",
    "encode_scales",
    "fake_quant",
    "fake_quant_with_scale_gradient",
    "neighbours",
    "pack",
    "parse_format",
    "quantize_with_scales",
    "rotate_blocks",
    "rotated_fake_quant",
    "round_columns",
    "round_to_element",
    "unpack",
]
