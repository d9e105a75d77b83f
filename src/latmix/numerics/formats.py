"""Number formats as values: what a block of numbers looks like when it is stored.

An `Element` is a grid: the few numbers that one code can mean, all derived from the layout of its bits. The one idea
worth telling is that the integers are floats as well. INT8 with its step of 2^-6 is "one exponent bit, six mantissa
bits, bias 1", a float whose subnormal and normal ranges share one spacing. So grid, maximum and rounding need no second
case; only the code of a negative number differs (two's complement, hence no -0).

A `BlockFormat` adds what a block of elements shares: a scale, the rule that chooses it, and the rounding of halves.
`"mxfp4:block=16,scale=even"` is parsed once, at the edge, and the object is handed whole to the arithmetic.

Given up: zero points, codebooks, several scales per block. This file does not import torch.
Source of the grids: OCP Microscaling Formats (MX) v1.0, sections 5.3 and 5.4; NVFP4: NVIDIA's documents for Blackwell.
"""

import dataclasses
import math
from typing import overload

from latmix.errors import InputError
from latmix.registry import Registry, parse_spec

ROUNDINGS = ("even", "away")
"""What happens to a value halfway between two neighbours: to the even code (IEEE 754, OCP) or away from zero."""

SCALE_RULES = {"e8m0": ("floor", "ceil", "rceil", "even", "search"), "e4m3": ("nearest", "search")}
"""The scale rules of each scale element; `latmix.numerics.scales` gives formula and source of each."""


@dataclasses.dataclass(frozen=True)
class Element:
    """The grid of one code: sign, `exponent_bits`, `mantissa_bits`, with subnormals.

    Args:
        specials: what the highest magnitude codes mean instead of a number ("nan", "inf"), in order of the codes.
        complement: negative codes are two's complement. There is no -0, and the most negative code, which OCP lets
            an implementation leave unused (section 5.3.4), decodes but is never produced: the range is symmetric.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: tuple[str, ...] = ()
    complement: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    def magnitude(self, code: int) -> float:
        """The number that a code without sign stands for."""
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        steps = mantissa if exponent == 0 else (mantissa + (1 << self.mantissa_bits)) << (exponent - 1)
        return steps * self.smallest

    @property
    def grid(self) -> tuple[float, ...]:
        """The finite numbers without sign, ascending: `grid[code]` is the magnitude of `code`."""
        return tuple(self.magnitude(code) for code in range(2 ** (self.bits - 1) - len(self.specials)))

    @property
    def values(self) -> tuple[float, ...]:
        """The value of each of the 2^bits codes, specials included."""
        magnitudes = self.grid + tuple(float(special) for special in self.specials)
        if self.complement:
            return magnitudes + tuple(-self.smallest * (len(magnitudes) - code) for code in range(len(magnitudes)))
        return magnitudes + tuple(-magnitude for magnitude in magnitudes)

    @property
    def max(self) -> float:
        """The largest finite number: 6, 7.5, 28, 448, 57344, 127/64, 7/4."""
        return self.magnitude(2 ** (self.bits - 1) - len(self.specials) - 1)

    @property
    def emax(self) -> int:
        """floor(log2(max)): the exponent of the largest finite number."""
        return math.frexp(self.max)[1] - 1

    @property
    def smallest_normal(self) -> float:
        """Below this power of two the spacing of the grid is constant."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest positive number, the spacing around zero."""
        return self.smallest_normal * 2.0**-self.mantissa_bits


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """Blocks of `block` consecutive elements of the last dimension under one scale each.

    Args:
        name: the key in `FORMATS`; `str(format)` is the name and what differs from that entry, and parses back.
        block: elements per scale; a shorter last block has its own scale.
        scale: the rule that chooses a block's scale, one of `SCALE_RULES[scale_element]`.
        rounding: one of `ROUNDINGS`.
        scale_element: "e8m0", a power of two from 2^-127 to 2^127 with 0xFF = NaN (OCP MX v1.0, section 5.4.1), or
            "e4m3", a positive E4M3 number under one float32 scale for the whole tensor (NVFP4).
        tensor_scale: that scale, a power of two, if it is the same for every tensor; by default it follows each
            tensor's largest magnitude.

    Raises:
        LatmixError: a value outside these choices.
    """

    name: str
    element: Element
    block: int = 32
    scale: str = "floor"
    rounding: str = "even"
    scale_element: str = "e8m0"
    tensor_scale: float | None = None

    def __post_init__(self) -> None:
        choices = {"scale_element": tuple(SCALE_RULES), "rounding": ROUNDINGS}
        choices["scale"] = SCALE_RULES.get(self.scale_element, ())
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise InputError(f"{self.name}: unknown {key} '{getattr(self, key)}'; known: {', '.join(known)}.")
        if not 1 <= self.block <= BLOCKS:
            raise InputError(f"{self.name}: block is {self.block}; it must be a positive integer up to {BLOCKS}.")
        if self.tensor_scale is not None:
            if self.scale_element == "e8m0":
                raise InputError(f"{self.name}: it has no tensor_scale.")
            if self.tensor_scale not in E8M0[1:-1]:
                raise InputError(f"{self.name}: tensor_scale is {self.tensor_scale}; it must be {_POWER}.")

    def __str__(self) -> str:
        default = FORMATS[self.name]
        changed = [f"{key}={getattr(self, key)}" for key in _KEYS if getattr(self, key) != getattr(default, key)]
        return f"{self.name}:{','.join(changed)}" if changed else self.name

    @property
    def bits_per_element(self) -> float:
        """Storage, the share of the block's scale included: 4.25 for MXFP4. (NVFP4's one float per tensor is not.)"""
        return self.element.bits + 8 / self.block

    @property
    def scale_grid(self) -> tuple[float, ...]:
        """The value of each scale byte, ascending; the byte after the last one is NaN, higher ones are not used."""
        return E8M0 if self.scale_element == "e8m0" else ELEMENTS[self.scale_element].grid

    @property
    def scale_range(self) -> tuple[float, float]:
        """The smallest positive and the largest scale."""
        scale = None if self.scale_element == "e8m0" else ELEMENTS[self.scale_element]
        return (scale.smallest, scale.max) if scale else (E8M0[0], E8M0[-1])


_KEYS = ("block", "scale", "rounding", "tensor_scale")
BLOCKS = 2**16  # a tensor is padded to whole blocks
E8M0 = tuple(2.0**exponent for exponent in range(-127, 128))
_POWER = "a power of two from 2^-126 to 2^126, such as 1 or 0.0625"

ELEMENTS: Registry[Element] = Registry("element")
for _element in (
    Element("e2m1", 2, 1, bias=1),
    Element("e2m3", 2, 3, bias=1),
    Element("e3m2", 3, 2, bias=3),
    Element("e4m3", 4, 3, bias=7, specials=("nan",)),
    Element("e5m2", 5, 2, bias=15, specials=("inf", "nan", "nan", "nan")),
    Element("int8", 1, 6, bias=1, complement=True),
    Element("int4", 1, 2, bias=1, complement=True),  # no OCP format: the field's convention, INT8 scaled down
):
    ELEMENTS.add(_element.name, _element)

FORMATS: Registry[BlockFormat] = Registry("format")
for _format in (
    BlockFormat("mxfp4", ELEMENTS["e2m1"]),
    BlockFormat("mxfp6_e2m3", ELEMENTS["e2m3"]),
    BlockFormat("mxfp6_e3m2", ELEMENTS["e3m2"]),
    BlockFormat("mxfp8_e4m3", ELEMENTS["e4m3"]),
    BlockFormat("mxfp8_e5m2", ELEMENTS["e5m2"]),
    BlockFormat("mxint8", ELEMENTS["int8"]),
    BlockFormat("mxint4", ELEMENTS["int4"]),
    BlockFormat("nvfp4", ELEMENTS["e2m1"], block=16, scale="nearest", scale_element="e4m3"),
):
    FORMATS.add(_format.name, _format)


@overload
def parse_format(text: str | BlockFormat) -> BlockFormat: ...
@overload
def parse_format(text: None) -> None: ...
def parse_format(text: str | BlockFormat | None) -> BlockFormat | None:
    """Read `"name"` or `"name:key=value,..."` with the keys block, scale, rounding and (NVFP4) tensor_scale; a
    `BlockFormat` passes through, and so does None (activations that are left alone).

    Raises:
        LatmixError: an unknown name, key or value, or a malformed text; the message lists the choices.
    """
    if text is None or isinstance(text, BlockFormat):
        return text
    name, properties = parse_spec(text)
    changes: dict[str, str | float] = dict(properties)
    for key, value in properties.items():
        if key not in _KEYS:
            raise InputError(f"{name}: unknown property '{key}'; known: {', '.join(_KEYS)}.")
        if key == "block":
            if not (value.isascii() and value.isdigit() and len(value) <= len(str(BLOCKS))):
                raise InputError(f"{name}: block is '{value}'; it must be a positive integer up to {BLOCKS}.")
            changes[key] = int(value)
        if key == "tensor_scale":
            try:
                changes[key] = float(value)
            except ValueError:
                raise InputError(f"{name}: tensor_scale is '{value}'; it must be {_POWER}.") from None
    return dataclasses.replace(FORMATS[name], **changes)  # type: ignore[arg-type]
