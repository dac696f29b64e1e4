"""Accelerated jobs on several ranks: they decide alike, and make the video of one rank, in the same steps."""

import json
import random
import shutil
from dataclasses import dataclass

import accelerated_rank
import gloo_ranks
import pytest
import random_hunyuan
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, BlockCacheSpec, Calibration, StepCacheSpec
from ascend_runtime.specs.acceleration import STEP_CACHES
from ascend_runtime.recognition.calibration_file import calibration_file, read_calibration, write_calibration
from ascend_runtime.wire.messages import Sample
from msgspec import structs
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
WAN = ("one expert", "two experts", "taking turns")
HUNYUAN = ("t2v", "t2v, guided", "t2v, little", "i2v concat", "i2v replace")
SAMPLE = {  # of HunyuanVideo: (a plan's number in PLANS, cache, model)
    2: [(4, "teacache", "t2v, guided"), (1, "teacache", "t2v, little"), (2, "fbcache", "i2v replace"),
        (3, "attention", "i2v concat")],
    4: [(3, "teacache", "t2v, guided"), (1, "fbcache", "t2v, little"), (1, "blocks", "i2v concat")],
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """settings: of SampleSpec. latent: the start. known: whether its first frame is known."""

    spec: DiffusionModelSpec
    prompts: tuple[Conditioning, Conditioning]
    settings: dict[str, float]
    latent: torch.Tensor
    known: bool = False

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(**{"seed": 3, "steps": STEPS, "shift": 5.0, "solver": "euler"} | self.settings)

    @property
    def noise_mask(self) -> torch.Tensor | None:
        mask = torch.ones(1, 1, *self.latent.shape[2:])
        mask[:, :, 0] = 0
        return mask if self.known else None


def wan_model(name, checkpoints, specs, folder):
    """guidance_scale of one model's second expert is 1, so that its ranks all compute cond."""
    folder = shutil.copytree(checkpoints(layers=3, experts=1 if name == "one expert" else 2), folder)
    spec = DiffusionModelSpec(path=str(folder), experts="swap" if name == "taking turns" else "resident")
    own = {"guidance_scale_low_noise": 1.0} if name == "two experts" else {}
    prompts = tuple(Conditioning(text=specs.text(seed)) for seed in (1, 2))
    return Model(spec, prompts, {"guidance_scale": 3.0, **own}, torch.zeros(SHAPE))


def hunyuan_model(name, folder):
    """Guidance is embedded in each; "guided" has two passes as well. Of "little", which has two tokens of video, most
    ranks have only text."""
    kind, _, form = name.partition(", ")
    random_hunyuan.folder(folder, kind)
    draw = torch.Generator().manual_seed(7)
    sizes = (random_hunyuan.TEXT_DIM, random_hunyuan.POOLED_DIM)
    prompts = tuple(Conditioning(text=torch.randn(1, tokens, sizes[0], generator=draw),
                                 pooled=torch.randn(1, sizes[1], generator=draw)) for tokens in (7, 4))  # fmt: skip
    latent, image = torch.zeros((1, 16, 1, 2, 4) if form == "little" else SHAPE), torch.randn(1, 16, 1, 6, 10)
    if kind == "i2v concat":
        prompts = tuple(structs.replace(one, concat_latent=image) for one in prompts)
    elif kind == "i2v replace":
        latent[:, :, :1] = image
    settings = {"guidance_scale": 3.0 if form == "guided" else 1.0, "shift": 7.0}
    return Model(DiffusionModelSpec(path=str(folder)), prompts, settings, latent, known=kind == "i2v replace")


@pytest.fixture(scope="module")
def models(checkpoints, specs, tmp_path_factory):
    """By name: a model with a calibration next to it."""
    made = {}
    for name in (*WAN, *HUNYUAN):
        folder = tmp_path_factory.mktemp("models") / "model"
        made[name] = wan_model(name, checkpoints, specs, folder) if name in WAN else hunyuan_model(name, folder)
        known = Calibration(coefficients=(0.1, 0.0), ratios=(1.0, 0.98, 0.99, 0.97, 0.98))
        experts = ["high_noise"] if name in ("one expert", *HUNYUAN) else ["high_noise", "low_noise"]
        write_calibration(calibration_file(str(folder)), dict.fromkeys(experts, known))
    return made


def cases(ranks, every):
    """(plan, cache, model): each plan with all caches where that is asked for, else with one or two, and SAMPLE."""
    for number, plan in enumerate(PLANS[ranks]):
        for place, cache in enumerate(CACHES):
            if every or (place + number) % (3 if plan.get("fsdp") else 6) == 0:
                model = WAN[(number + place // 3) % (2 if plan.get("fsdp") else 3)]
                yield ParallelSpec(ranks=ranks, **plan), cache, model
            if every:
                models = ["t2v, guided"] if plan.get("cfg_degree") == 2 else HUNYUAN
                yield ParallelSpec(ranks=ranks, **plan), cache, models[(number + place) % len(models)]
    for number, cache, model in [] if every else SAMPLE[ranks]:
        yield ParallelSpec(ranks=ranks, **PLANS[ranks][number]), cache, model


@pytest.fixture(scope="module")
def on_one_rank(one_rank, models):
    """`on_one_rank(cache, model)`: the latent, and what was left out."""
    done = {}

    def sample(cache, name):
        if (cache, name) not in done:
            model = models[name]
            result = one_rank.sample(model.spec, model.sample, model.latent, *model.prompts,
                                     noise_mask=model.noise_mask,
                                     acceleration=AccelerationSpec(**CACHES[cache]))  # fmt: skip
            done[cache, name] = result.tensor, result.info["acceleration"]
        return done[cache, name]

    return sample


@pytest.mark.parametrize("ranks", PLANS)
def test_all_ranks_decide_alike_and_make_one_video(ranks, pytestconfig, models, on_one_rank, tmp_path):
    asked = list(cases(ranks, pytestconfig.getoption("--all-accelerators")))
    accelerated_rank.save_jobs(tmp_path, [
        Sample(job=number, model=model.spec, parallel=plan, spec=model.sample, latent=model.latent,
               noise_mask=model.noise_mask, positive=model.prompts[0], negative=model.prompts[1],
               acceleration=AccelerationSpec(**CACHES[cache]), calibration=read_calibration(model.spec.path))
        for number, (plan, cache, model) in enumerate((plan, cache, models[name]) for plan, cache, name in asked)
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
