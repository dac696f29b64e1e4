"""HunyuanVideo's jobs equal diffusers' pipelines with the same weights and seed, on one rank and on two."""

import copy

import pytest
import random_hunyuan
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec, SampleSpec, VaeSpec
from ascend_runtime.engine.sampling import noise_of
from diffusers import HunyuanVideoTransformer3DModel
from hunyuan_pipelines import GUIDANCE, PADDED, SEED, SIZE, STEPS, TEXT, Case
from msgspec.structs import replace
from safetensors.torch import save_file

NEAR = 1e-4
CFG = 3.0
SHAPE = SIZE.latent_shape()
PLANS = {
    "cfg 2": {"cfg_degree": 2},
    "ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
    "slices 2": {"tp_degree": 2},
    "shares 2": {"ulysses_degree": 2, "fsdp": True},
}
SOME_PLANS = {("t2v", "cfg 2"), ("i2v concat", "ulysses 2"), ("i2v replace", "ring 2"), ("i2v replace", "slices 2")}
REPLACE = {"guiding_frame_index": 0.0}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(kind: str) -> Case:
        if kind not in made:
            made[kind] = Case(kind, tmp_path_factory.mktemp("hunyuan"))
        return made[kind]

    return case


def near(latent, expected, within=NEAR):
    error, deviation = (latent - expected).abs().max().item(), expected.std().item()
    print(f"at most {error:.1e} apart, their standard deviation is {deviation:.2f}")
    assert deviation > 0.1 and error < within


def shown(case, latent):
    """diffusers drops the first latent frame of a model of 33 channels."""
    return latent[:, :, 1:] if case.kind == "i2v concat" else latent


def given(case, **changes):
    """Both prompts with the same changes."""
    return {name: replace(case.inputs()[name], **changes) for name in ("positive", "negative")}


# One rank


@pytest.mark.parametrize("cfg", [1.0, CFG], ids=["one branch", "true guidance"])
@pytest.mark.parametrize("kind", random_hunyuan.KINDS)
def test_one_rank_equals_diffusers(cases, one_rank, kind, cfg):
    case = cases(kind)
    near(shown(case, case.sample(one_rank, guidance_scale=cfg)), case.expected(cfg=cfg))


@pytest.mark.parametrize("kind", random_hunyuan.KINDS)
def test_frames_equal_diffusers(cases, one_rank, kind):
    """Which drops the first four of a model of 33 channels."""
    case = cases(kind)
    expected = case.expected(output_type="pt")
    frames = one_rank.decode(VaeSpec(path=str(case.folder)), case.sample(one_rank)).tensor
    assert len(frames) == SIZE.num_frames
    near(frames[4:] if kind == "i2v concat" else frames, expected)


@pytest.mark.parametrize("kind", ["t2v", "i2v replace"])
def test_bfloat16_is_as_near_to_float32_as_diffusers_own(cases, one_rank, kind):
    """At guidance 8, which bfloat16 has exactly times 1000; 6 becomes 6016, on both sides. diffusers' text to video is
    farther away, as it rounds the timestep too."""
    case = cases(kind)
    model = DiffusionModelSpec(path=str(case.folder), dtype="bfloat16")
    exact = case.expected(guidance_scale=8.0)
    ours = case.sample(one_rank, model=model, embedded_guidance=8.0)
    theirs = case.expected(guidance_scale=8.0, dtype=torch.bfloat16)
    errors = [((made - exact).norm() / exact.norm()).item() for made in (ours, theirs)]
    print("away from float32: ours {:.4f}, theirs {:.4f}".format(*errors))
    assert errors[0] < 1.1 * errors[1] < 0.2
    rounded = case.sample(one_rank, model=model), case.expected(dtype=torch.bfloat16)
    assert (rounded[0] - rounded[1]).norm() / rounded[1].norm() < 2 * errors[1]


def test_a_job_may_start_without_the_image_in_its_noise(cases, one_rank):
    """As core ComfyUI's do; in diffusers by a noise that makes up for it."""
    case = cases("i2v replace")
    image = case.first_frame() * case.scaling
    expected = case.expected(latents=(noise_of(SHAPE, SEED) - 0.001 * image) / 0.999)
    plain = case.sample(one_rank, image_start=False)
    near(plain, expected)
    assert (plain - case.expected()).abs().max() > 50 * NEAR


def test_a_given_first_frame_stays(cases, one_rank):
    case = cases("i2v replace")
    near(case.sample(one_rank)[:, :, :1], case.first_frame(), 1e-6)


# Guidance


def test_the_embedded_guidance_is_the_conditionings_then_the_jobs_then_the_models(cases, one_rank):
    case = cases("t2v")
    own = given(case, numbers={"guidance": 3.0})
    near(case.sample(one_rank, **own), case.expected(guidance_scale=3.0))
    both = case.result(one_rank, **own, embedded_guidance=8.0)
    near(both.tensor, case.expected(guidance_scale=3.0))
    assert both.info["embedded guidance"] == 3.0
    job = case.result(one_rank, embedded_guidance=8.0)
    near(job.tensor, case.expected(guidance_scale=8.0))
    assert job.info["embedded guidance"] == 8.0
    assert case.result(one_rank).info["embedded guidance"] == GUIDANCE
    apart = (case.expected(guidance_scale=8.0) - case.expected()).abs().max()
    assert apart > 100 * NEAR, "the guidance does not show"


def test_a_guidance_of_none_is_a_pass_without_one(cases, one_rank):
    """As core's FluxDisableGuidance asks for; in diffusers, a network without the embedder."""
    case = cases("t2v")
    without = copy.copy(case)
    without.made = {}
    without.transformer = HunyuanVideoTransformer3DModel(**random_hunyuan.config(guidance_embeds=False)).eval()
    without.transformer.load_state_dict(case.transformer.state_dict(), strict=False)
    made = case.result(one_rank, **given(case, numbers={"guidance": None}))
    near(made.tensor, without.expected())
    assert "embedded guidance" not in made.info


def test_each_branch_has_its_own_guidance(cases, one_rank):
    """The only step of a job is linear in both branches."""
    case, once = cases("t2v"), {"steps": 1}
    inputs = case.inputs()
    positive = replace(inputs["positive"], numbers={"guidance": 3.0})
    cond = case.sample(one_rank, positive=positive, **once)
    uncond = case.sample(one_rank, positive=inputs["negative"], embedded_guidance=8.0, **once)
    both = case.sample(one_rank, positive=positive, embedded_guidance=8.0, guidance_scale=CFG, **once)
    near(both, uncond + CFG * (cond - uncond))


def test_a_model_that_reads_no_guidance_says_that_a_conditionings_has_no_effect(cases, one_rank):
    case = cases("i2v concat")
    made = case.result(one_rank, **given(case, numbers={"guidance": 6.0}))
    assert torch.equal(made.tensor, case.sample(one_rank))
    assert made.info["warnings"] == [
        f"The {name} conditioning's guidance (6) has no effect, as this model reads none."
        for name in ("positive", "negative")
    ]


# Text, batches, known parts, other starts


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool], ids=str)
def test_text_ends_where_its_mask_does(cases, one_rank, dtype):
    case = cases("t2v")
    padded = torch.full((2, PADDED, case.texts.shape[2]), 50.0)
    padded[:, :TEXT] = case.texts
    mask = {"attention_mask": (torch.arange(PADDED) < TEXT)[None].to(dtype)}
    prompts = {name: Conditioning(text=text[None], pooled=pooled[None], tensors=mask)
               for name, text, pooled in zip(("positive", "negative"), padded, case.pooled)}  # fmt: skip
    near(case.sample(one_rank, **prompts), case.expected())


def test_two_videos_of_one_prompt(cases, one_rank):
    case = cases("t2v")
    latent = torch.zeros(2, *SHAPE[1:])
    made = case.sample(one_rank, latent=latent)
    near(made, case.expected(batch=2))
    twice = {name: replace(one, text=one.text.repeat(2, 1, 1), pooled=one.pooled.repeat(2, 1))
             for name, one in given(case).items()}  # fmt: skip
    near(case.sample(one_rank, latent=latent, **twice), made, 1e-6)


@pytest.mark.parametrize("kind", ["i2v concat", "i2v replace"])
def test_two_videos_of_one_image(cases, one_rank, kind):
    case = cases(kind)
    inputs = case.inputs()
    both = case.sample(one_rank, latent=inputs["latent"].repeat(2, 1, 1, 1, 1))
    noise = torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(noise[:1], noise_of(SHAPE, SEED))
    near(both[:1], case.sample(one_rank), 1e-5)
    assert (both[0, :, 1:] - both[1, :, 1:]).abs().max() > 0.1


def test_a_start_below_full_noise(cases, one_rank):
    case, first = cases("t2v"), 0.7
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    mixed = first * noise_of(SHAPE, SEED) + (1 - first) * clean * case.scaling
    expected = case.expected(shift=1.0, num_inference_steps=2, sigmas=[first, 0.3], latents=mixed)
    near(case.sample(one_rank, latent=clean, sigmas=(first, 0.3, 0.0)), expected)


@torch.no_grad()
def test_a_known_part_is_clean_in_each_pass(cases, one_rank):
    """As core ComfyUI shows it to HunyuanVideo's networks."""
    case = cases("t2v")
    latent, mask = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)), torch.ones(1, 1, *SHAPE[2:])
    mask[..., :4] = 0
    made = case.sample(one_rank, latent=latent, noise_mask=mask, shift=1.0)
    text, pooled, valid = case.texts[:1], case.pooled[:1], torch.ones(1, TEXT)
    known, x = latent * case.scaling, noise_of(SHAPE, SEED)
    for step in range(STEPS):
        sigma, following = 1 - step / STEPS, 1 - (step + 1) / STEPS
        seen = x * mask + known * (1 - mask)
        velocity = case.transformer(seen, torch.tensor([1000 * sigma]), text, valid, pooled,
                                            torch.tensor([6000.0]), return_dict=False)[0]  # fmt: skip
        x0 = (seen - sigma * velocity) * mask + known * (1 - mask)
        x = x + (following - sigma) * (x - x0) / sigma
    near(made, x / case.scaling)
    near(made[..., :4], latent[..., :4], 1e-5)


# The first frame as further channels


def test_without_an_image_the_start_latent_is_the_known_video(cases, one_rank):
    """As in core ComfyUI."""
    case = cases("i2v concat")
    inputs = case.inputs()
    latent = torch.zeros(SHAPE)
    latent[:, :, :1] = case.first_frame()
    mask = torch.ones(1, 1, *SHAPE[2:])
    mask[:, :, 0] = 0
    bare = {name: replace(inputs[name], concat_latent=None, concat_mask=None) for name in ("positive", "negative")}
    said = given(case, concat_latent=latent, concat_mask=mask)
    both = [case.sample(one_rank, latent=latent, noise_mask=mask, image_start=False, **one) for one in (bare, said)]
    near(*both, 1e-6)
    without = case.sample(one_rank, image_start=False, **bare)
    assert (without - both[0]).abs().max() > 0.1


# Weights whose config does not say what they are for


@pytest.fixture(scope="module")
def single_file(cases, tmp_path_factory):
    """The weights of both models of 16 channels, which are the same, in a file."""
    case = cases("t2v")
    file = tmp_path_factory.mktemp("file") / "transformer.safetensors"
    save_file(case.transformer.state_dict(), file)
    return DiffusionModelSpec(path=str(file))


def test_a_guiding_frame_decides_what_weights_without_a_config_are(cases, one_rank, single_file):
    text, image = (cases(kind) for kind in ("t2v", "i2v replace"))
    near(text.sample(one_rank, model=single_file), text.expected())
    near(image.sample(one_rank, model=single_file, **given(image, numbers=REPLACE)), image.expected())
    near(image.sample(one_rank, **given(image, numbers=REPLACE)), image.expected())
    inputs = image.inputs()
    only_positive = {**given(image, numbers=REPLACE), "negative": inputs["negative"]}
    made = image.sample(one_rank, model=single_file, guidance_scale=CFG, **only_positive)
    near(made, image.expected(cfg=CFG))


# Two ranks


def test_two_ranks_equal_diffusers(request, cases, two_ranks):
    every = {(kind, plan) for kind in random_hunyuan.KINDS for plan in PLANS}
    for kind, plan in sorted(every if request.config.getoption("--all-plans") else SOME_PLANS):
        case = cases(kind)
        cfg = CFG if plan == "cfg 2" else 1.0
        print(kind, plan)
        near(shown(case, case.sample(two_ranks, plan=PLANS[plan], guidance_scale=cfg)), case.expected(cfg=cfg))


def test_a_job_with_one_branch_gives_the_ranks_of_the_cfg_axis_to_the_sequence(cases, two_ranks):
    made = cases("t2v").result(two_ranks, plan={"cfg_degree": 2})
    near(made.tensor, cases("t2v").expected())
    assert (made.info["cfg_degree"], made.info["ulysses_degree"]) == (1, 2)


def test_a_warm_up_changes_nothing(cases, two_ranks):
    for kind in ("i2v concat", "i2v replace"):
        case = cases(kind)
        two_ranks.free()
        made = case.result(two_ranks, warm_up=True)
        assert "warm up" in made.seconds
        near(shown(case, made.tensor), case.expected())


# What is refused


def mask(*rows: int) -> dict:
    return {"tensors": {"attention_mask": torch.tensor([[int(bit) for bit in f"{row:0{TEXT}b}"] for row in rows])}}


LATENT_OF_AN_IMAGE = torch.zeros(1, 16, 1, *SHAPE[3:])
REFUSED = [  # kind, changes of the negative prompt, what the error says
    ("t2v", {"pooled": None}, ["has no pooled vector", "[1, 12]"]),
    ("t2v", {"text": torch.zeros(1, 4, 9)}, ["[1, 4, 9]", "[1, tokens, 24]"]),
    ("t2v", mask(0b1101111), ["excludes tokens before others", "or none"]),
    ("t2v", mask(0), ["excludes tokens before others, or all"]),
    ("t2v", {"tensors": {"attention_mask": torch.ones(1, 5)}}, ["[1, 5]", "[1, 7]"]),
    ("t2v", {**mask(0b1110000, 0b1111000), "text": torch.zeros(2, TEXT, 24)}, ["3, 4 tokens", "one by one"]),
    ("t2v", {"numbers": REPLACE}, ["carries guiding_frame_index", "text-to-video model", "model of v2"]),
    ("t2v", {"concat_latent": LATENT_OF_AN_IMAGE}, ["image (concat_latent)", "reads 33 channels", "v2 (replace)"]),
    ("t2v", {"clip_vision": torch.zeros(1, 4, 8)}, ["clip_vision_output", "Connect the image to Ascend Text Encode"]),
    ("t2v", {"tensors": {"ref_latent": LATENT_OF_AN_IMAGE}}, ["carries ref_latent", "guidance_type custom"]),
    ("t2v", {"tensors": {"conditioning_byt5small": torch.zeros(1, 4, 8)}}, ["conditioning_byt5small", "1.5"]),
    ("t2v", {"numbers": {"strength": 1.0}}, ["carries strength, which this model does not use", "Connect the output"]),
    ("t2v", {"tensors": {"guidance": torch.zeros(1)}}, ["carries guidance, which"]),
    ("t2v", {"numbers": {"attention_mask": 1.0}}, ["carries attention_mask, which"]),
    ("i2v replace", {"numbers": {"guiding_frame_index": 2.0}}, ["guiding_frame_index", "2. Only the first frame, 0"]),
    ("i2v replace", {"concat_mask": torch.ones(SHAPE)[:, :1]}, ["image (concat_mask)", "for the one that reads 16"]),
    ("i2v concat", {"numbers": REPLACE}, ["carries guiding_frame_index", "reads 33 channels", "Choose v1 (concat)"]),
    ("i2v concat", {"concat_mask": torch.ones(1, 4, *SHAPE[2:])}, ["[1, 4, 3, 6, 10]", "[1, 1, 1 to 3 frames"]),
    ("i2v concat", {"concat_latent": torch.zeros(1, 16, 4, 6, 10)}, ["[1, 16, 4, 6, 10]", "1 to 3 frames", "same"]),
    ("i2v concat", {"concat_latent": torch.full((1, 16, 1, 6, 10), torch.nan)}, ["concat_latent has NaN"]),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes, says", REFUSED, ids=[says[0] for _, _, says in REFUSED])
def test_conditioning_that_does_not_fit(cases, two_ranks, kind, changes, says):
    case, pids = cases(kind), two_ranks.pids
    batch = len(changes.get("text", [1]))
    latent = case.inputs()["latent"].repeat(batch, 1, 1, 1, 1)
    negative = replace(case.inputs()["negative"], **changes)
    with pytest.raises(ValueError) as error:
        case.sample(two_ranks, negative=negative, latent=latent)
    assert not [words for words in [*says, "negative conditioning"] if words not in str(error.value)], error.value
    assert two_ranks.pids == pids


HALF_KNOWN = torch.zeros(1, 1, *SHAPE[2:]).index_fill(4, torch.arange(3), 1.0)


@pytest.mark.parametrize("kind, changes, says", [
    ("i2v replace", {"noise_mask": None}, "does not hold one: its noise_mask must be 0 in the whole first frame"),
    ("i2v replace", {"noise_mask": HALF_KNOWN}, "Connect the latent of the image-to-video node, with v2"),
    ("i2v concat", {"embedded_guidance": 6.0}, "embedded_guidance is 6, but this model reads no guidance scale"),
    ("t2v", {"image_start": True}, "this job has no image that the video begins with"),
    ("t2v", {"latent": torch.zeros(1, 16, 3, 5, 10)}, "height is 40, as the latent has 5 rows; .* multiple of 16"),
    ("t2v", {"latent": torch.zeros(1, 32, 3, 6, 10)}, r"needs \[B,16,T,H,W\]"),
    ("t2v", {"guidance_scale": 2.0, "negative": None}, "needs a negative prompt"),
])  # fmt: skip
def test_a_job_that_does_not_fit(cases, two_ranks, kind, changes, says):
    pids = two_ranks.pids
    with pytest.raises(ValueError, match=says):
        cases(kind).sample(two_ranks, **changes)
    assert two_ranks.pids == pids


@pytest.mark.parametrize("settings, says", [
    ({"embedded_guidance": 6.0}, "reads no guidance scale. Leave it at its default; guidance_scale"),
    ({"image_start": True}, "or the model has no such start"),
])  # fmt: skip
def test_other_families_refuse_its_settings(two_ranks, specs, settings, says):
    spec, latent = SampleSpec(guidance_scale=1.0, **settings), torch.zeros(1, 16, 1, 4, 4)
    with pytest.raises(ValueError, match=says):
        two_ranks.sample(specs.model, spec, latent, specs.text(1))
