"""The ledger of costs measures what happened."""

import time

import torch

from latmix.stages import Stages


def test_time_and_peak_memory_belong_to_their_stage() -> None:
    stages = Stages()
    with stages.stage("big"):
        block = torch.ones(64, 2**20)  # 256 MiB
        time.sleep(0.05)
        del block
    with stages.stage("small"):
        pass
    big, small = stages.costs["big"], stages.costs["small"]
    assert big["seconds"] >= 0.05 > small["seconds"]
    assert big["peak_bytes"] - small["peak_bytes"] > 200 * 2**20
