"""What links between hosts carry, and a slow one that loses packets: the same video."""

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


@pytest.mark.parametrize("ranks_of_each", [2])
def test_tensors_go_to_each_machine_once_and_frames_come_back_once(pairs, ranks_of_each):
    """Counted at host2, and between the client and the relay of its own host."""
    pair = pairs(ranks_of_each)
    tensor, frames = torch.rand(2**21), torch.Size((8, 256, 256, 3))
    sent, _ = passed(pair, lambda: pair.client.ping(tensor))
    _, came = passed(pair, lambda: pair.client.ping(frames=frames))
    assert [count / tensor.nbytes for count in sent] == pytest.approx([1, 1], abs=0.05)
    assert [count / 4 / frames.numel() for count in came] == pytest.approx([0.5, 0.5], abs=0.05)


def passed(pair, call):
    """The bytes that each machine receives meanwhile, and those that it sends."""
    interfaces = (pair.hosts[0], "lo"), (pair.hosts[1], "eth0")
    before = [host.passed(interface) for host, interface in interfaces]
    call()
    after = [host.passed(interface) for host, interface in interfaces]
    return [[new[way] - old[way] for old, new in zip(before, after)] for way in (0, 1)]
