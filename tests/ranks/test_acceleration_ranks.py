"""Accelerated jobs on several ranks: they decide alike, and make the video of one rank, in the same steps."""

import json
import random
import shutil

import accelerated_rank
import gloo_ranks
import pytest
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, Calibration, StepCacheSpec
from ascend_runtime.specs.acceleration import STEP_CACHES
from ascend_runtime.recognition.calibration_file import calibration_file, read_calibration, write_calibration
from ascend_runtime.wire.messages import Sample
from safetensors.torch import load_file
from torch.testing import assert_close

SHAPE = (1, 16, 3, 6, 10)  # 45 tokens, of which no two ranks have as many
STEPS = 8
SCHEDULES = 1000
CACHES = {
    "attention": {"attention_cache": AttentionCacheSpec(start=2, end=8, interval=3)},
    "blocks": {"block_cache": BlockCacheSpec(start=1, end=7, interval=2, first_block=1, last_block=1)},
    "fbcache": {"step_cache": StepCacheSpec(threshold=0.7)},
    "teacache": {"step_cache": StepCacheSpec(method="teacache", threshold=0.25)},
    "magcache": {"step_cache": StepCacheSpec(method="magcache", threshold=0.1)},
    "taylorseer": {"step_cache": StepCacheSpec(method="taylorseer", interval=3, first_steps=2)},
}
PLANS = {
    2: [{"cfg_degree": 2}, {"ulysses_degree": 2}, {"ring_degree": 2, "ulysses_degree": 1}, {"tp_degree": 2},
        {"cfg_degree": 2, "fsdp": True}, {"cfg_degree": 1, "fsdp": True}],
    4: [{"cfg_degree": 2, "ulysses_degree": 2}, {"ring_degree": 2, "ulysses_degree": 2},
        {"cfg_degree": 2, "tp_degree": 2}, {"cfg_degree": 2, "ulysses_degree": 2, "fsdp": True}],
}  # fmt: skip
MODELS = {"one expert": {}, "two experts": {"guidance_scale_low_noise": 1.0}, "taking turns": {}}


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    """By name: a model with a calibration beside it."""
    made = {}
    for name in MODELS:
        experts = 1 if name == "one expert" else 2
        folder = shutil.copytree(checkpoints(layers=3, experts=experts), tmp_path_factory.mktemp("models") / "model")
        ratios = (1.0, 0.98, 0.99, 0.97, 0.98)
        known = Calibration(coefficients=(0.1, 0.0), ratios=ratios)
        write_calibration(calibration_file(str(folder)), dict.fromkeys(["high_noise", "low_noise"][:experts], known))
        made[name] = DiffusionModelSpec(path=str(folder), experts="swap" if name == "taking turns" else "resident")
    return made


def settings(name):
    """guidance_scale of one model's second expert is 1, so that its ranks all compute cond."""
    return SampleSpec(seed=3, steps=STEPS, shift=5.0, solver="euler", guidance_scale=3.0, **MODELS[name])


def cases(ranks, every):
    """(plan, cache, model): each plan with all caches where that is asked for, else with one or two."""
    names = list(MODELS)
    for number, plan in enumerate(PLANS[ranks]):
        for place, cache in enumerate(CACHES):
            if every or (place + number) % (3 if plan.get("fsdp") else 6) == 0:
                model = names[(number + place // 3) % (2 if plan.get("fsdp") else 3)]
                yield ParallelSpec(ranks=ranks, **plan), cache, model


@pytest.fixture(scope="module")
def on_one_rank(one_rank, specs, models):
    """`on_one_rank(cache, model)`: the latent, and what was left out."""
    done = {}

    def sample(cache, model):
        if (cache, model) not in done:
            result = one_rank.sample(models[model], settings(model), torch.zeros(SHAPE), specs.text(1), specs.text(2),
                                     acceleration=AccelerationSpec(**CACHES[cache]))  # fmt: skip
            done[cache, model] = result.tensor, result.info["acceleration"]
        return done[cache, model]

    return sample


@pytest.mark.parametrize("ranks", PLANS)
def test_all_ranks_decide_alike_and_make_one_video(ranks, pytestconfig, specs, models, on_one_rank, tmp_path):
    asked = list(cases(ranks, pytestconfig.getoption("--all-accelerators")))
    texts = [Conditioning(text=specs.text(seed)) for seed in (1, 2)]
    accelerated_rank.save_jobs(tmp_path, [
        Sample(job=number, model=models[model], parallel=plan, spec=settings(model), latent=torch.zeros(SHAPE),
               positive=texts[0], negative=texts[1], acceleration=AccelerationSpec(**CACHES[cache]),
               calibration=read_calibration(models[model].path))
        for number, (plan, cache, model) in enumerate(asked)
    ])  # fmt: skip
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    schedules = list(random_schedules(random.Random(seed), SCHEDULES if ranks == 4 else 100))
    (tmp_path / "schedules.json").write_text(json.dumps(schedules))
    gloo_ranks.run("accelerated_rank.py", tmp_path, ranks, timeout=300)
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(ranks)]
    latents = load_file(tmp_path / "out-0.safetensors")
    for number, (plan, cache, model) in enumerate(asked):
        expected, left_out = on_one_rank(cache, model)
        assert left_out["steps_reusing"], f"{cache} leaves nothing out of {model}"
        for rank in range(ranks):
            assert told[rank]["jobs"][number]["steps_reusing"] == left_out["steps_reusing"], (plan, cache, model)
        assert_close(latents[str(number)], expected, atol=1e-4, rtol=0.0, msg=lambda text: f"{plan} {cache}: {text}")
    for number, schedule in enumerate(schedules):
        assert all(one["decided"][number] == told[0]["decided"][number] for one in told), schedule
    some = [steps for steps in told[0]["decided"] if steps]
    assert SCHEDULES // 4 * (ranks == 4) < len(some) < len(schedules), "of both kinds there are some"


def random_schedules(draw, count):
    for number in range(count):
        steps = draw.randint(1, 12)
        method = draw.choice(STEP_CACHES)
        threshold = draw.choice([None, 0.0, draw.uniform(0, 1.5)])
        yield {
            "seed": number, "steps": steps, "switch": draw.randint(1, steps + 3), "parallel": draw.random() < 0.5,
            "guided": {"high_noise": draw.random() < 0.8, "low_noise": draw.random() < 0.8},
            "spec": {"method": method, "threshold": threshold, "last_steps": draw.randint(0, 2),
                     "first_steps": draw.choice([None, 1, 3]), "most": draw.choice([None, 1, 3]),
                     "interval": draw.randint(1, 5), "order": draw.randint(0, 3)},
        }  # fmt: skip
