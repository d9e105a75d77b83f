"""How long work tells the world where it stands. The library is silent; the command line draws a bar."""


class Progress:
    """Told of every stage and of every unit of work inside it. This one keeps silent; subclasses show."""

    def stage(self, name: str, total: int) -> None:
        """A stage of `total` units (steps, layers, windows) begins; the one before it has ended."""

    def advance(self, note: str = "") -> None:
        """One unit is done; `note` is a few words or a figure."""
