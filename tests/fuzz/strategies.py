"""Inputs that are almost right: valid ones with a few edits, in JSON's own terms where they are JSON."""

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**9, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", " ", "none", "\ud800", "a\0b", "..", "../x.safetensors", "/etc/passwd", "C:\\x", "x" * 300, "9" * 5000),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1] * 1000, ["a", 1], "org/kernel", "ⅷ", "١"),
]
TOKENS = [
    *":,=.{}[]\"'\n\r\t \0/\\-+eE",
    "..",
    "\ufeff",
    "\ud800",
    "٣",
    "²",
    "none",
    "true",
    "NaN",
    "-1",
    "1e999",
    "9" * 30,
    "9" * 5000,
]

scalars = st.one_of(st.sampled_from(NASTY), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def edited_json(draw: st.DrawFn, seeds: Sequence[Any]) -> bytes:
    """One of the values with one to three places replaced, removed or added, or any JSON value at all."""
    value = copy.deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        value = _edited(draw, value)
    return json.dumps(value).encode()


def _edited(draw: st.DrawFn, value: Any) -> Any:
    """Go down by random keys, and change what stands there."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 9)) == 0:
        return copy.deepcopy(draw(values))  # a later edit may change it
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    match draw(st.sampled_from(("down", "down", "down", "remove", "add"))):
        case "down":
            value[key] = _edited(draw, value[key])
        case "remove":
            del value[key]
        case _ if isinstance(value, dict):
            value[draw(st.sampled_from(keys) | st.text(max_size=6))] = copy.deepcopy(draw(values))
        case _:
            value.insert(key, copy.deepcopy(draw(values)))
    return value


@st.composite
def edited_text(draw: st.DrawFn, seeds: Sequence[str]) -> bytes:
    """One of the texts with one to four pieces replaced by tokens, characters or pieces of another one."""
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        begin, end = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        end = end if draw(st.booleans()) else begin
        piece = draw(st.sampled_from(TOKENS) | st.text(max_size=4) | st.sampled_from(seeds))
        text = text[:begin] + piece + text[end:]
    return text.encode("utf-8", "surrogatepass")


@st.composite
def edited_bytes(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the files cut short, continued, or with up to four bytes or stretches changed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("flip", "cut", "insert", "copy"))):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case _:
                data[at : at + 8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)
