"""Every legal plan of HunyuanVideo makes what one rank makes, in fp32: cfg x ring x Ulysses x tensor, with FSDP and
without, layers in 8 bits too.

By default one combination of options for each plan of 2 and 3 ranks and for some of 4; with --all-plans all
combinations on 2, 3, 4 and 8.
"""

import itertools
import json
import math
import random
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import gloo_ranks
import hunyuan_ranks
import pytest
import torch
from ascend_runtime.specs.plans import AXES, Plan, legal_plans
from safetensors.torch import load_file

RANKS = (2, 3, 4, 8)
MOST = 1e-4  # the largest difference of any number of the latent
SOME_OF_FOUR = 3
# [B, C, T, H, W]: 25 tokens in a batch of 2; 3 tokens, fewer than ranks, or all on the first of them.
SHAPES = ((2, 16, 5, 2, 10), (1, 16, 3, 2, 2))
TEXTS = (1, 7, 256)
SCALES = (4.0, 1.0)  # without guidance the ranks of the cfg axis join Ulysses
EXCHANGES = (("rotate", False), ("gather", True))
EIGHT_BITS = "w8a8_dynamic"
MOST_IN_8_BITS = 0.05  # in slices, where the last digit of a sum may round an integer another way (as for Wan)


@dataclass(frozen=True)
class Case:
    """A plan, and how it works on what. text: the number of tokens of the prompt."""

    model: str
    plan: Plan
    fsdp: bool
    ring_exchange: str
    overlap: bool
    guidance_scale: float
    shape: tuple[int, ...]
    text: int
    quantization: str = "none"

    def __str__(self):
        plan = self.plan if self.guidance_scale != 1 else self.plan.unguided()
        options = [self.ring_exchange] * (plan.ring > 1) + ["overlap"] * (self.overlap and plan.ulysses > 1)
        options += ["fsdp"] * self.fsdp + ["8 bits"] * (self.quantization != "none")
        return (f"{self.plan}   {self.model:11}   guidance {self.guidance_scale:g}   "
                f"{math.prod(self.shape[2:]) // 4:2} + {self.text:3} tokens   {' '.join(options)}")  # fmt: skip

    @property
    def of_one_rank(self):
        """What a latent depends on, if not on the plan."""
        return self.model, self.quantization, self.shape, self.text, self.guidance_scale

    @property
    def most(self):
        return MOST_IN_8_BITS if self.quantization != "none" and self.plan.tp > 1 else MOST

    @property
    def arguments(self):
        return {**asdict(self), "plan": dict(zip(AXES, self.plan.degrees))}


def cases(ranks, rng, every):
    """For each plan of so many ranks all combinations of options, or one; models and lengths are drawn."""
    options = list(itertools.product((False, True), EXCHANGES, SCALES, TEXTS))
    made = []
    for plan in legal_plans(ranks):
        models = [name for name in hunyuan_ranks.MODELS if hunyuan_ranks.heads(name) % plan.tp == 0]
        for fsdp, exchange, scale, text in options if every else [rng.choice(options)]:
            made.append(Case(rng.choice(models), plan, fsdp, *exchange, scale, rng.choice(SHAPES), text))
    return made if every or ranks < 4 else rng.sample(made, SOME_OF_FOUR)


def in_8_bits(rng):
    """Slices, shares and both, on 2 ranks."""
    plans = [(Plan(tp=2), False), (Plan(ulysses=2), True)]
    return [
        Case(model, plan, fsdp, "rotate", False, 1.0, SHAPES[0], 7, EIGHT_BITS)
        for (plan, fsdp), model in zip(plans, rng.sample(list(hunyuan_ranks.MODELS), len(plans)))
    ]


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """(the cases by number of ranks, the folder with what these made)"""
    seed, every = random.randrange(2**32), request.config.getoption("--all-plans")
    rng, folder = random.Random(seed), tmp_path_factory.mktemp(f"seed_{seed}_")
    hunyuan_ranks.write(folder)
    by_ranks = {ranks: cases(ranks, rng, every) for ranks in (RANKS if every else RANKS[:3])}
    by_ranks[2] += in_8_bits(rng)
    arranged = {ranks: sorted(some, key=lambda case: (case.model, case.plan.tp, case.fsdp, case.quantization))
                for ranks, some in by_ranks.items()}  # fmt: skip
    arguments = {ranks: [case.arguments for case in some] for ranks, some in arranged.items()}
    (folder / "cases.json").write_text(json.dumps(arguments))
    gloo_ranks.run("hunyuan_ranks.py", folder, *arranged, timeout=3000)
    return arranged, folder


@pytest.mark.timeout(3600)  # with --all-plans
def test_a_plan_makes_what_one_rank_makes(request, capsys, made):
    arranged, folder = made
    expected = expected_of({case.of_one_rank for some in arranged.values() for case in some}, folder)
    errors = {}
    for ranks, some in arranged.items():
        latents = load_file(folder / f"{ranks}.safetensors")
        for number, case in enumerate(some):
            latent, looked = expected[case.of_one_rank]
            errors[case] = (latents[f"{number}"] - latent).abs().max().item()
            torch.testing.assert_close(latents[f"{number} looked"], looked, rtol=1e-4, atol=0)
    rows = [f"{error:.1e}   {case}" for case, error in errors.items()]
    table = "\n".join([f"{folder.name}: largest error, {' x '.join(AXES)}", *rows,
                       f"{max(errors.values()):.1e} of all {len(errors)}"])  # fmt: skip
    with capsys.disabled() if request.config.getoption("--all-plans") else nullcontext():
        print(table)
    assert all(error <= case.most for case, error in errors.items()), table


def expected_of(cases, folder):
    """The latents of one rank, and the sizes of the indicators of step caches."""
    made = {}
    for model, quantization in sorted({case[:2] for case in cases}):
        network = hunyuan_ranks.load(folder, model, quantization=quantization)
        assert bool(hunyuan_ranks.quantized_layers(network)) == (quantization != "none")
        for case in cases:
            if case[:2] == (model, quantization):
                shape, text, scale = case[2:]
                looking = hunyuan_ranks.Looking(None)
                latent = hunyuan_ranks.denoised(network, None, looking, shape=shape, text=text, guidance_scale=scale)
                assert latent.std() > 0.5
                made[case] = latent, looking.size
    return made


@pytest.mark.parametrize("form", hunyuan_ranks.FORMATS)
def test_two_layers_in_slices_make_their_sum(made, form):
    """A single block's proj_out in every format, by one all-reduce."""
    expected = hunyuan_ranks.joined(form)
    assert expected.std() > 0.1
    _, folder = made
    torch.testing.assert_close(load_file(folder / "2.safetensors")[form], expected, atol=1e-5, rtol=1e-5)


def test_all_plans_are_those_of_the_ranks():
    """Each axis on each number of ranks, by itself and in mixes."""
    counts = {ranks: len(legal_plans(ranks)) for ranks in RANKS}
    assert counts == {2: 4, 3: 3, 4: 9, 8: 16}
    assert all(math.prod(plan.degrees) == ranks for ranks in RANKS for plan in legal_plans(ranks))
