"""What ships with the package: a small trained model and Wikipedia text to calibrate and to report on (see README.md
beside this file for how they were made, licence and attribution)."""

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "demo-model"
CALIBRATION = Path(__file__).parent / "wikipedia-calibration.txt"
EVALUATION = Path(__file__).parent / "wikipedia-evaluation.txt"
