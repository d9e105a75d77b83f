"""Name → thing. Every family of things a user can name (formats, transforms, architectures, weight quantizers, recipes)
is one `Registry`, so that an unknown name is always answered with the known ones, and `latmix list` has one source."""

from collections.abc import ItemsView, Iterator
from typing import Generic, TypeVar

from latmix.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered mapping that explains itself when a name is unknown.

    Args:
        kind: what the entries are, singular, for messages ("format").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; a name is given once. Returns `thing`."""
        if name in self._things:
            raise InputError(f"{self.kind} '{name}' is registered twice.")
        self._things[name] = thing
        return thing

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            raise InputError(f"Unknown {self.kind} '{name}'; known: {', '.join(self._things)}.")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def names(self) -> list[str]:
        return list(self._things)

    def items(self) -> ItemsView[str, T]:
        return self._things.items()


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Split `"name:key=value,key=value"` into the name and its properties, both as written.

    Raises:
        LatmixError: a property without `=`, an empty name, or a key given twice.
    """
    name, _, tail = text.strip().partition(":")
    properties: dict[str, str] = {}
    for part in tail.split(",") if tail else []:
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not (name and equals and key and value):
            raise InputError(f"Cannot read '{text}': write name:key=value,key=value.")
        if key in properties:
            raise InputError(f"Cannot read '{text}': '{key}' is given twice.")
        properties[key] = value
    return name, properties
