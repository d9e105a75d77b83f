"""Short pieces of the embedded texts: enough for a tiny model, quick to tokenize."""

import tempfile
from pathlib import Path

from latmix import assets

_FOLDER = Path(tempfile.mkdtemp(prefix="latmix-tests-"))
CALIBRATION, OTHER = _FOLDER / "calibration.txt", _FOLDER / "other.txt"
CALIBRATION.write_text(assets.CALIBRATION.read_text("utf-8")[:8000], "utf-8")
OTHER.write_text(assets.EVALUATION.read_text("utf-8")[:4000], "utf-8")
