"""What goes wrong, in one sentence a user can act on."""


class LatmixError(Exception):
    """Bad input or a failed step. The message is one sentence: the culprit, then the choices. The CLI prints it."""
