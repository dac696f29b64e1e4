"""A rank that agrees with the others on the host's memory (see tests/unit/test_host_memory.py)."""

import torch
from ascend_runtime.components import HostMemory
from ascend_runtime.components.standby import DiffusionModels
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.hardware import devices
from gloo_ranks import join

AVAILABLE = (7_000_000_000_000, 5_000_000_000_003, 6_000_000_000_000)  # more than 32 bits hold
ON_HOST = ((2_000_000_000_001, 5, 0), (0, 6, 3), (1_000_000_000_000, 7, 0))  # one rank's device holds both experts


def main():
    _, rank, _ = join()
    devices.host_memory = lambda: AVAILABLE[rank]
    pipeline = RankPipeline(torch.device("cpu"))
    assert pipeline._host_memory() == HostMemory(min(AVAILABLE))
    DiffusionModels.on_host = ON_HOST[rank]
    assert pipeline._host_memory() == HostMemory(min(AVAILABLE), *map(sum, zip(*ON_HOST)))
