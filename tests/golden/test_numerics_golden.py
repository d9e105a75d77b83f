"""Pinned: the value of every code, and the codes and scale bytes of one small vector under every format and rule.

`decode_tables.csv` is facts, on which two independent libraries agree. `codes.json` was written by this package and
is confirmed by others in `parity/`: one byte per code or scale, in hexadecimal. To change it is to change what existing
checkpoints mean.
"""

import csv
import json
from pathlib import Path

import pytest
import torch

from latmix.numerics import ELEMENTS, FORMATS, SCALE_RULES, decode_scales, encode

HERE = Path(__file__).parent
PINNED = json.loads((HERE / "codes.json").read_text())
TABLES = list(csv.DictReader((HERE / "decode_tables.csv").read_text().splitlines()))


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e8m0"])
def test_the_value_of_every_code(name: str) -> None:
    expected = torch.tensor([float.fromhex(row["value"]) for row in TABLES if row["format"] == name])
    if name == "e8m0":
        values = decode_scales(torch.arange(256, dtype=torch.uint8), "mxfp4")
    else:
        values = torch.tensor(ELEMENTS[name].values)
    number = ~expected.isnan()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values[number], expected[number])
    assert torch.equal(values[number].signbit(), expected[number].signbit())


def test_the_tables_are_the_shared_ones(shared: Path) -> None:
    facts = csv.DictReader((shared / "mx-reference" / "decode_tables.csv").read_text().splitlines())
    assert [(row["format"], row["code"], row["hex"]) for row in facts] == [tuple(row.values()) for row in TABLES]


@pytest.mark.parametrize("name", PINNED["formats"])
def test_pinned_codes(name: str) -> None:
    """40 numbers: an outlier, ties, zeros, a partial last block just under a power of two."""
    x = torch.tensor([float.fromhex(number) for number in PINNED["input"]])
    pinned = PINNED["formats"][name]
    quantized = encode(x, name)
    assert bytes(quantized.scales.tolist()).hex() == pinned["scales"]
    assert bytes(quantized.codes.tolist()).hex() == pinned["codes"]
    tensor_scale = None if quantized.tensor_scale is None else quantized.tensor_scale.item().hex()
    assert tensor_scale == pinned["tensor_scale"]


def test_every_rule_is_pinned() -> None:
    names = {f"{name}:scale={rule}" for name in FORMATS for rule in SCALE_RULES[FORMATS[name].scale_element]}
    assert set(PINNED["formats"]) == names | {f"{name}:rounding=away" for name in FORMATS}
