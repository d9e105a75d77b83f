"""Frozen dataclasses from text: a JSON object, or dotted keys that replace fields, checked against the types."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from latmix.errors import InputError

Value = TypeVar("Value")

EXACT = 2**53
"""The largest number up to which JSON carries every integer exactly (RFC 8259, section 6)."""


def replaced(value: Value, settings: Mapping[str, str]) -> Value:
    """The dataclass with fields replaced by dotted keys: `{"learning.steps": "50", "folded.values": "qr"}`.

    A setting is read as JSON where it is JSON (`50`, `true`), as text otherwise; `none` empties a field or removes a
    map; a field that holds several words takes them separated by commas.

    Raises: LatmixError: unknown key (the known are listed) or a value that is not of the field's type.
    """
    values: dict[str, Any] = dataclasses.asdict(value)  # type: ignore[call-overload]
    for key, text in settings.items():
        *path, last = key.split(".")
        place, hint = values, type(value)
        for name in path:
            hint = _hint(hint, name, key)
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
        _hint(hint, last, key)
        place[last] = _value(text)
    result: Value = build(type(value), values)
    return result


def build(hint: Any, value: Any, key: str = "") -> Any:
    """`value`, as JSON knows it, turned into the type `hint`; `key` names it in errors.

    Raises: LatmixError: a key that the type does not have, or a value of the wrong type.
    """
    kind = _concrete(hint)
    if value is None and kind is not hint:
        return None
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        inside = {
            name: build(_hint(kind, name, _join(key, name)), part, _join(key, name)) for name, part in value.items()
        }
        required = [part.name for part in dataclasses.fields(kind) if part.default is part.default_factory]
        if absent := [name for name in required if name not in inside]:
            raise InputError(f"The recipe lacks '{_join(key, absent[0])}'.")
        return kind(**inside)
    if typing.get_origin(kind) is Mapping and isinstance(value, dict):
        return {name: build(str, part, _join(key, name)) for name, part in value.items() if part is not None}
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple, str)):
        words = [word for word in value.split(",") if word] if isinstance(value, str) else value
        return tuple(build(str, word, key) for word in words)
    if kind in (int, float) and type(value) in (int, float) and not -EXACT <= value <= EXACT:  # NaN too
        raise InputError(f"Recipe key '{key}' takes a number of at most 2⁵³, not {value!r:.40}.")
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise InputError(f"Recipe key '{key}' takes {getattr(kind, '__name__', kind)}, not {value!r:.80}.")


def _value(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return parsed(text)
    except ValueError:
        return text


def parsed(text: str) -> Any:
    """JSON from a stranger. Raises: ValueError: it is none, or nested too deeply, or a number too long to read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _concrete(hint: Any) -> Any:
    """`X | None` → `X`."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return hint


def _hint(owner: Any, name: str, key: str) -> Any:
    """The type of field `name` of the dataclass or mapping type `owner`."""
    owner = _concrete(owner)
    if typing.get_origin(owner) is Mapping:
        return typing.get_args(owner)[1]
    hints = typing.get_type_hints(owner) if dataclasses.is_dataclass(owner) else {}
    hints = {key: hint for key, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}
    if name not in hints:
        choices = f"'{name}' is none of {', '.join(hints)}" if hints else f"'{name}' has nothing to be inside of"
        raise InputError(f"Unknown recipe key '{key}': {choices}.")
    return hints[name]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
