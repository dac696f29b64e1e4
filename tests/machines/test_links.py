"""A slow link, which loses packets: the same video."""

import pytest
import torch
from ascend_runtime import ParallelSpec, SampleSpec
from torch.testing import assert_close

NEAR = {"atol": 1e-4, "rtol": 0.0}


def video(runtime, specs, parallel):
    """Latent and frames."""
    spec = SampleSpec(seed=5, steps=2, guidance_scale=4.0)
    latent = torch.zeros(1, 16, 2, 6, 6)
    latent = runtime.sample(specs.model, spec, latent, specs.text(1), specs.text(2), parallel=parallel).tensor
    return latent, runtime.decode(specs.vae, latent).tensor


@pytest.mark.timeout(600)
def test_a_video_over_a_link_that_is_slow_and_loses_packets(request, pairs, one_rank, specs):
    """40 ms to the client and back, and of 100 packets one is lost. With --all-machines also 5 of them."""
    pair = pairs(1)
    expected = video(one_rank, specs, ParallelSpec(ranks=1))
    try:
        for percent in (1, 5) if request.config.getoption("--all-machines") else (1,):
            for host in pair.hosts:
                host.lose(percent)
            made = video(pair.client, specs, ParallelSpec(ranks=2, cfg_degree=2))
            lost = [host.lost for host in pair.hosts]
            print(f"{percent} %: {lost} packets were lost")
            assert max(lost) > 0
            for one, other in zip(made, expected):
                assert_close(one, other, **NEAR)
    finally:
        for host in pair.hosts:
            host.lose(0)
