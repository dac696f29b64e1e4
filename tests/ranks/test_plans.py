"""Every legal plan gives what one rank gives, in fp32: cfg x ring x Ulysses x tensor, with FSDP and without.

Text-to-video through the runtime; image-to-video with a timestep a token through the network (see ti2v_ranks.py), as
the runtime has no such job yet. By default one combination of options for each plan, the first on 2 and 4 ranks and
the second on 2 and 8; all of them on 2, 4 and 8 with --all-plans.
"""

import itertools
import json
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import gloo_ranks
import pytest
import ti2v_ranks
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.specs import Plan
from ascend_runtime.specs.plans import AXES
from safetensors.torch import load_file

RANKS = (2, 4, 8)
MOST = 1e-4  # the largest difference of any number of the latent
STEPS = 4
HEADS = 6  # which Ulysses 4 does not divide, nor Ulysses 2 what tensor 2 leaves of them
ODD, FEW = (2, 16, 5, 2, 10), (1, 16, 3, 2, 2)  # 25 tokens in a batch of 2; 3 tokens, fewer than ranks
DEGREES = {"cfg": (1, 2), "ring": (1, 2, 4), "ulysses": (1, 2, 4), "tp": (1, 2)}
SCALES = (4.0, 1.0)  # without guidance the ranks of the cfg axis join Ulysses


@dataclass(frozen=True)
class Case:
    """A plan, and how it works on what."""

    plan: Plan
    fsdp: bool
    ring_exchange: str
    overlap: bool
    guidance_scale: float
    shape: tuple[int, ...]

    def __str__(self):
        plan = self.plan if self.guidance_scale != 1 else self.plan.unguided()
        options = [self.ring_exchange] * (plan.ring > 1) + ["overlap"] * (self.overlap and plan.ulysses > 1)
        options += ["fsdp"] * self.fsdp
        return (f"{self.plan}   guidance {self.guidance_scale:g}   {math.prod(self.shape[2:]) // 4:2} tokens   "
                f"{' '.join(options)}")  # fmt: skip


def plans(ranks):
    every = (Plan(**dict(zip(AXES, degrees))) for degrees in itertools.product(*(DEGREES[axis] for axis in AXES)))
    return [plan for plan in every if math.prod(plan.degrees) == ranks]


def cases(request, ranks, rng):
    """For each plan of so many ranks one combination of options, or all of them; lengths are drawn."""
    options = list(itertools.product((False, True), (("rotate", False), ("gather", True)), SCALES))
    number = len(options) if request.config.getoption("--all-plans") else 1
    return [
        Case(plan, fsdp, *exchange, scale, rng.choice((ODD, FEW)))
        for plan in plans(ranks)
        for fsdp, exchange, scale in rng.sample(options, number)
    ]


@pytest.fixture
def report(request, capsys):
    """`report(title, errors)`: prints the largest error of each case, and holds it to the bound."""

    def show(title, errors):
        rows = [f"{error:.1e}   {case}" for case, error in errors.items()]
        table = "\n".join(["", f"{title}: largest error, {' x '.join(AXES)}", *rows,
                           f"{max(errors.values()):.1e}   of all {len(errors)}"])  # fmt: skip
        with capsys.disabled() if request.config.getoption("--all-plans") else nullcontext():
            print(table)
        assert max(errors.values()) <= MOST, table

    return show


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six_heads")
    tiny_models.wan_transformer(seed=4, num_attention_heads=HEADS).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def sample(runtime, checkpoint, text, shape, guidance_scale, parallel=None):
    spec = SampleSpec(seed=11, steps=STEPS, guidance_scale=guidance_scale, shift=5.0)
    model = DiffusionModelSpec(path=str(checkpoint))
    return runtime.sample(model, spec, torch.zeros(shape), text(1), text(2), parallel=parallel).tensor


def pytest_generate_tests(metafunc):
    if "ranks" in metafunc.fixturenames:  # 8 take long to start
        metafunc.parametrize("ranks", RANKS if metafunc.config.getoption("--all-plans") else (2, 4))


@pytest.mark.timeout(1800)  # with --all-plans
def test_text_to_video(request, rng, report, runtimes, new_runtime, one_rank, checkpoint, specs_of, ranks):
    expected = {
        (shape, scale): sample(one_rank, checkpoint, specs_of.text, shape, scale)
        for shape in (ODD, FEW) for scale in SCALES
    }  # fmt: skip
    assert all(latent.std() > 0.1 for latent in expected.values())
    errors = {}
    with nullcontext(runtimes(2)) if ranks == 2 else new_runtime(ranks) as runtime:
        for case in cases(request, ranks, rng):
            options = {"fsdp": case.fsdp, "ring_exchange": case.ring_exchange, "overlap": case.overlap}
            parallel = ParallelSpec(ranks=ranks, **case.plan.info, **options)
            latent = sample(runtime, checkpoint, specs_of.text, case.shape, case.guidance_scale, parallel)
            errors[case] = difference(latent, expected[case.shape, case.guidance_scale])
    report(f"text-to-video, {ranks} ranks", errors)


@pytest.mark.timeout(1800)  # with --all-plans
def test_a_first_frame_continued(request, rng, report, checkpoint):
    """Image-to-video with a timestep a token: 0 for those of the frame that is given."""
    some_ranks = RANKS if request.config.getoption("--all-plans") else (2, 8)
    by_ranks = {ranks: cases(request, ranks, rng) for ranks in some_ranks}
    arguments = {
        ranks: [{**asdict(case), "plan": dict(zip(AXES, case.plan.degrees)), "steps": STEPS} for case in some]
        for ranks, some in by_ranks.items()
    }
    (checkpoint / "cases.json").write_text(json.dumps(arguments))
    gloo_ranks.run("ti2v_ranks.py", checkpoint, 1, timeout=1500)
    network = ti2v_ranks.load(checkpoint)
    expected = {
        (shape, scale): ti2v_ranks.continued(network, None, shape, scale, STEPS)
        for shape in (ODD, FEW) for scale in SCALES
    }  # fmt: skip
    assert all(latent.std() > 0.1 for latent in expected.values())
    for ranks, some in by_ranks.items():
        latents = load_file(checkpoint / f"{ranks}.safetensors")
        report(f"image-to-video, {ranks} ranks", {
            case: difference(latents[str(number)], expected[case.shape, case.guidance_scale])
            for number, case in enumerate(some)
        })  # fmt: skip


def difference(latent, expected):
    return (latent - expected).abs().max().item()
