"""Two experts that take turns on the device: the same video, and each part is fetched once, as soon as it can be."""

import pytest
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.components.experts import HIGH_NOISE, LOW_NOISE, ExpertSwap
from torch import nn
from torch.testing import assert_close

CPU = torch.device("cpu")
SHAPE = (1, 16, 2, 4, 6)


class Network(nn.Module):
    """Blocks that tell when they compute, between two layers of the network's own."""

    def __init__(self, told):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.told = told

    def forward(self, x):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            self.told.append(("computes", number))
            x = block(x)
        return x


@pytest.fixture
def experts():
    """(the network, the two experts' outputs for `x`, the swap, x, what happened)."""
    torch.manual_seed(0)
    told = []
    high, low = Network(told), Network(told)
    x = torch.randn(2, 4)
    with torch.no_grad():
        outputs = {HIGH_NOISE: high(x), LOW_NOISE: low(x)}
        host = {name: {key: x.clone() for key, x in network.named_parameters()}
                for name, network in ((HIGH_NOISE, high), (LOW_NOISE, low))}  # fmt: skip
        swap = ExpertSwap(high, list(high.blocks), host, CPU)
        told.clear()
        yield high, outputs, swap, x, told


def test_use_makes_the_network_that_expert(experts):
    network, outputs, swap, x, _ = experts
    for expert in (HIGH_NOISE, LOW_NOISE, LOW_NOISE, HIGH_NOISE):
        swap.use(expert)
        assert torch.equal(network(x), outputs[expert])
    assert swap.fetched == 2 * 4  # three blocks and the rest, there and back


def test_parts_are_fetched_in_the_pass_before_and_only_once(experts, monkeypatch):
    network, outputs, swap, x, told = experts
    fetch = swap._fetch
    blocks = {id(swap._parts[block]): number for number, block in enumerate(network.blocks)}
    monkeypatch.setattr(swap, "_fetch", lambda part, expert: (told.append(("fetches", blocks.get(id(part)))),
                                                              fetch(part, expert)))  # fmt: skip
    swap.fetch_ahead(LOW_NOISE)
    assert torch.equal(network(x), outputs[HIGH_NOISE])
    each = [[("computes", number), ("fetches", number)] for number in range(3)]
    assert told == [*sum(each, []), ("fetches", None)]
    before = swap.fetched
    swap.use(LOW_NOISE)
    assert swap.fetched == before == 4
    assert torch.equal(network(x), outputs[LOW_NOISE])


def test_an_expert_that_is_fetched_in_vain_is_replaced(experts):
    """A video is cancelled in the pass that fetches, and another begins."""
    network, outputs, swap, x, _ = experts
    swap.fetch_ahead(LOW_NOISE)
    network(x)
    swap.use(HIGH_NOISE)
    assert torch.equal(network(x), outputs[HIGH_NOISE])
    swap.fetch_ahead(HIGH_NOISE)
    assert torch.equal(network(x), outputs[HIGH_NOISE]) and swap.fetched == 8


@pytest.mark.parametrize("ranks, plan", [(1, None), (2, ParallelSpec(ranks=2, cfg_degree=2)),
                                         (2, ParallelSpec(ranks=2, tp_degree=2, cfg_degree=1))])  # fmt: skip
def test_the_video_is_that_of_resident_experts(runtimes, specs_of, checkpoints, ranks, plan):
    folder = str(checkpoints(experts=2))
    specs = specs_of(folder)
    latents = []
    for experts in ("resident", "swap"):
        model = DiffusionModelSpec(path=folder, experts=experts)
        for _ in range(2):  # the second begins with what the first has left
            latents.append(runtimes(ranks).sample(
                model, SampleSpec(seed=5, steps=4, shift=5.0), torch.zeros(SHAPE), specs.text(1), specs.text(2),
                parallel=plan,
            ).tensor)  # fmt: skip
    assert latents[0].std() > 0.1
    for latent in latents[1:]:
        assert_close(latent, latents[0], atol=0.0, rtol=0.0)


def test_a_swap_of_shared_weights_is_refused(two_ranks, specs_of, checkpoints):
    folder = str(checkpoints(experts=2))
    specs = specs_of(folder)
    with pytest.raises(ValueError, match="experts is 'swap', but fsdp shards their weights"):
        two_ranks.sample(DiffusionModelSpec(path=folder, experts="swap"), SampleSpec(steps=2), torch.zeros(SHAPE),
                         specs.text(1), specs.text(2), parallel=ParallelSpec(ranks=2, fsdp=True))  # fmt: skip
