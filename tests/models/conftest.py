"""Fixtures of tests that compute in their own process."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def one_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
