"""Two diffusion models on each rank: the one that is not in use waits, and comes back without a file being read."""

import os
import shutil

import outer_sampler
import pytest
import random_lora
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, SampleSpec
from benchmarks.opens import Opened
from gloo_ranks import run
from safetensors.torch import load_file

SHAPE = (1, 16, 2, 4, 6)
WEIGHTS = "transformer*/*.safetensors"
PLANS = {
    "one rank": (1, {}),
    "cfg": (2, {}),
    "FSDP": (2, {"fsdp": True}),
    "slices": (2, {"tp_degree": 2}),
}


@pytest.fixture
def pair(checkpoints, specs_of, tmp_path):
    """Two models that no rank has loaded yet: of one expert, and of two, which take turns or stay."""
    return [specs_of(shutil.copytree(checkpoints(experts=experts), tmp_path / str(experts))) for experts in (1, 2)]


def opened(*specs):
    return Opened(file for one in specs for file in one.folder.glob(WEIGHTS))


def sample(runtime, specs, parallel=None, **model):
    spec = SampleSpec(steps=2, seed=1, guidance_scale=4.0, shift=5.0)
    model = DiffusionModelSpec(path=str(specs.folder), **model)
    text = specs.text(1)
    return runtime.sample(model, spec, torch.zeros(SHAPE), text, -text, parallel=parallel).tensor


@pytest.mark.parametrize("experts", ["resident", "swap"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_switch_between_two_models_reads_no_file(runtimes, pair, plan, experts):
    if plan == "FSDP" and experts == "swap":
        pytest.skip("fsdp keeps both experts on the device")
    ranks, degrees = PLANS[plan]
    parallel, (one, two) = ParallelSpec(ranks=ranks, **degrees), pair
    jobs = {"one": lambda: sample(runtimes(ranks), one, parallel),
            "two": lambda: sample(runtimes(ranks), two, parallel, experts=experts)}  # fmt: skip
    first = {name: job() for name, job in jobs.items()}
    assert (first["one"] - first["two"]).abs().max() > 1e-2
    with opened(*pair) as files:
        for name in ("one", "two", "one"):
            assert torch.equal(jobs[name](), first[name])
    assert files.files() == []


def test_loras_stay_with_the_model_that_waits(runtimes, pair, tmp_path):
    one, two = pair
    file = tmp_path / "lora.safetensors"
    random_lora.save(file, "kohya", load_file(next(one.folder.glob(WEIGHTS))), seed=2)
    loras = [LoraSpec(path=str(file), strength=strength) for strength in (0.7, 0.3)]
    plain, strong, weak = (sample(runtimes(2), one, loras=chosen) for chosen in ((), loras[:1], loras[1:]))
    assert min((plain - strong).abs().max(), (strong - weak).abs().max()) > 1e-2
    with opened(one) as files:
        for chosen, expected in ((loras[1:], weak), (loras[:1], strong), ((), plain)):
            sample(runtimes(2), two)
            assert torch.equal(sample(runtimes(2), one, loras=tuple(chosen)), expected)
    assert files.files() == []


def test_two_models_of_calls_alternate(two_ranks, pair):
    """As a graph with one MODEL for the noisy steps and one for the others has them; a call each, or some."""
    specs = [one.model for one in pair]
    inputs = {"cond": {"text": pair[0].text(1)}, "uncond": {"text": pair[0].text(2)}}

    def video():
        high = outer_sampler.euler(two_ranks, specs[0], inputs, SHAPE, (1.0, 0.9, 0.8))
        return high, outer_sampler.euler(two_ranks, specs[1], inputs, SHAPE, (0.8, 0.5, 0.0))

    first = video()
    with opened(*pair) as files:
        again = video()
        two_ranks.load(specs[0])
    assert files.files() == []
    assert all(map(torch.equal, first, again)) and not torch.equal(*first)


def test_after_free_both_are_read_again(two_ranks, pair):
    first = [sample(two_ranks, one) for one in pair]
    two_ranks.free()
    with opened(*pair) as files:
        again = [sample(two_ranks, one) for one in pair]
    assert {file.parents[1] for file in files.files()} == {one.folder for one in pair}
    assert all(map(torch.equal, first, again))


def test_a_third_model_takes_the_place_of_the_one_used_longest_ago(two_ranks, pair, specs):
    for one in (*pair, specs):
        sample(two_ranks, one)
    with opened(pair[1]) as kept:
        sample(two_ranks, pair[1])
    with opened(pair[0]) as gone:
        sample(two_ranks, pair[0])
    assert kept.files() == [] and gone.files()


def test_a_model_whose_files_changed_is_not_kept(two_ranks, pair):
    """It would wait in vain, and push out the other one."""
    one, two = pair
    before = sample(two_ranks, one), sample(two_ranks, two)
    config = two.folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"eps": 1e-06', '"eps": 0.5'))
    assert not torch.equal(sample(two_ranks, two), before[1])
    with opened(one) as files:
        assert torch.equal(sample(two_ranks, one), before[0])
    assert files.files() == []
    file = next(one.folder.glob(WEIGHTS))
    os.utime(file, ns=(1, 1))
    with opened(one) as files:
        assert torch.equal(sample(two_ranks, one), before[0])
    assert files.files()


def test_a_job_that_is_refused_leaves_both(two_ranks, pair, tmp_path):
    first = [sample(two_ranks, one) for one in pair]
    with pytest.raises(ValueError, match="There is no LoRA"):
        sample(two_ranks, pair[0], loras=(LoraSpec(path=str(tmp_path / "none.safetensors")),))
    broken = shutil.copytree(pair[0].folder, tmp_path / "broken")
    next(broken.glob(WEIGHTS)).write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="safetensors"):
        two_ranks.load(DiffusionModelSpec(path=str(broken)))
    with opened(*pair) as files:
        assert all(torch.equal(sample(two_ranks, one), latent) for one, latent in zip(pair, first))
    assert files.files() == []


def test_all_ranks_keep_a_second_model_or_none_does(pair, tmp_path):
    """On real ranks whose host is pretended to be short, or short on one of them."""
    for number, one in enumerate(pair):
        (tmp_path / f"model-{number}").symlink_to(one.folder)
    run("two_models_rank.py", tmp_path, 2)
