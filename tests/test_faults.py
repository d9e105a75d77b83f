"""A sample of the fault campaign: some kills and one of every other fault. `python -m benchmarks.faults` does more."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_sample_of_faults_is_survived() -> None:
    command = [sys.executable, "-m", "benchmarks.faults", "--sample"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in ("SIGKILL", "SIGINT", "SIGTERM", "ENOSPC", "two processes", "damaged run", "NaN in a batch"):
        assert f"| {fault}" in done.stdout
