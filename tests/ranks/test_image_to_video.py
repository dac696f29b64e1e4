"""Image to video on one and two ranks equals diffusers' WanImageToVideoPipeline with the same weights and seed.

The models are small and random: Wan 2.1 with CLIP, first and last frame, Wan 2.2 with two experts, and TI2V.
"""

import dataclasses

import pytest
import tiny_models
import torch
from ascend_runtime import Conditioning, DiffusionModelSpec, JobCancelled, ParallelSpec, SampleSpec
from ascend_runtime.recognition.experts import boundary_of
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.models.wan.defaults import defaults_of
from msgspec.structs import replace
from PIL import Image
from torch.testing import assert_close

TOLERANCE = {"atol": 1e-3, "rtol": 0.0}
WIDTH, HEIGHT, FRAMES, STEPS, SEED = 96, 64, 9, 3, 7
SCALES = {"guidance_scale": 4.0, "guidance_scale_2": 2.5}
PLANS = {
    "one rank": (1, {}),
    "cfg 2": (2, {"cfg_degree": 2}),
    "ulysses 2": (2, {"ulysses_degree": 2}),
    "ring 2": (2, {"ring_degree": 2}),
    "slices 2": (2, {"tp_degree": 2}),
    "shares 2": (2, {"ulysses_degree": 2, "fsdp": True}),
}


class Case:
    """A model on disk, an image or two, and what diffusers makes of them."""

    def __init__(self, name: str, folder, specs_of):
        self.pipeline = tiny_models.image_pipeline(name)
        self.specs = specs_of(tiny_models.save(self.pipeline, folder))
        self.two_images = name == "first and last frame"
        self.first_frame_in_latent = name == "ti2v"
        generator = torch.Generator().manual_seed(21)
        pixels = torch.rand(2, HEIGHT, WIDTH, 3, generator=generator).mul(255).round().byte()
        self.images = [Image.fromarray(image.numpy()) for image in pixels[: 2 if self.two_images else 1]]
        self.pixels = pixels.float() / 255
        self.expected = self._theirs()

    @torch.no_grad()
    def _theirs(self) -> torch.Tensor:
        scales = SCALES if self.pipeline.config.boundary_ratio else {"guidance_scale": SCALES["guidance_scale"]}
        latent = self.pipeline(
            image=self.images[0], last_image=self.images[1] if self.two_images else None,
            prompt="a red ball", negative_prompt="blurry", height=HEIGHT, width=WIDTH, num_frames=FRAMES,
            num_inference_steps=STEPS, generator=torch.Generator().manual_seed(SEED), output_type="latent", **scales,
        ).frames  # fmt: skip
        high = self.pipeline.scheduler.timesteps >= 1000 * (self.pipeline.config.boundary_ratio or 0)
        assert high.all() == (self.pipeline.transformer_2 is None), "the steps do not cross the boundary"
        return tiny_models.denormalised(latent, self.pipeline.vae)

    @torch.no_grad()
    def clip_vision(self) -> torch.Tensor | None:
        """[1, 257 or 514, IMAGE_DIM]"""
        if self.pipeline.image_encoder is None:
            return None
        return self.pipeline.encode_image(self.images).flatten(0, 1).unsqueeze(0)

    def video(self) -> torch.Tensor:
        """The frames as far as they are known, grey else."""
        video = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.5)
        video[0] = self.pixels[0]
        if self.two_images:
            video[-1] = self.pixels[1]
        return video

    def inputs(self, runtime) -> dict:
        """What `Runtime.sample` takes beside description and plan, made by the runtime itself."""
        positive, negative = (runtime.encode(self.specs.encoder, text).tensor for text in ("a red ball", "blurry"))
        if self.first_frame_in_latent:
            return self._first_frame_in_latent(runtime, positive, negative)
        known = runtime.encode_video(self.specs.vae, self.video()).tensor
        mask = torch.ones(1, 4, *known.shape[2:])
        mask[:, :, 0] = 0
        if self.two_images:
            mask[:, 3, -1] = 0
        image = {"concat_latent": known, "concat_mask": mask, "clip_vision": self.clip_vision()}
        return {
            "latent": torch.zeros_like(known),
            "positive": Conditioning(text=positive, **image),
            "negative": Conditioning(text=negative, **image),
        }

    def _first_frame_in_latent(self, runtime, positive, negative) -> dict:
        first = runtime.encode_video(self.specs.vae, self.pixels[:1]).tensor
        latent = torch.zeros_like(self.expected)
        latent[:, :, :1] = first
        mask = torch.ones(1, 1, *latent.shape[2:])
        mask[:, :, 0] = 0
        return {"latent": latent, "positive": positive, "negative": negative, "noise_mask": mask}


@pytest.fixture(scope="module")
def cases(tmp_path_factory, specs_of):
    made = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp("image_to_video"), specs_of)
        return made[name]

    return case


def ours(runtime, case: Case, degrees=None, guidance_scale=4.0, **changes):
    spec = SampleSpec(
        seed=SEED, steps=STEPS, shift=5.0, guidance_scale=guidance_scale, guidance_scale_low_noise=2.5
        if case.pipeline.config.boundary_ratio else None,
    )  # fmt: skip
    arguments = {**case.inputs(runtime), **changes}
    parallel = ParallelSpec(ranks=runtime.world_size, **(degrees or {}))
    return runtime.sample(case.specs.model, spec, parallel=parallel, **arguments)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", tiny_models.IMAGE_MODELS)
def test_latents_equal_diffusers(cases, runtimes, name, plan):
    ranks, degrees = PLANS[plan]
    case = cases(name)
    latent = ours(runtimes(ranks), case, degrees).tensor
    error = (latent - case.expected).abs().max().item()
    print(f"{name}, {plan}: at most {error:.1e} apart, their deviation is {case.expected.std():.2f}")
    assert case.expected.std() > 0.1
    assert_close(latent, case.expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["wan 2.1", "ti2v"])
def test_the_image_shows_in_the_latent(cases, one_rank, name):
    """Equal latents prove little if the image's part in them were nothing."""
    case = cases(name)
    inputs = case.inputs(one_rank)
    if name == "ti2v":
        changes = [{"noise_mask": None}, {"latent": inputs["latent"] + 1}]
    else:
        parts = ("concat_latent", "concat_mask", "clip_vision")
        changes = [{"positive": changed(inputs["positive"], lambda part: 1 - part.flip(-1), [p])} for p in parts]
    for change in changes:
        assert (ours(one_rank, case, **change).tensor - case.expected).abs().max() > 10 * TOLERANCE["atol"], change


def changed(given: Conditioning, change, parts=("text", "concat_latent", "concat_mask", "clip_vision")):
    return replace(given, **{part: change(getattr(given, part)) for part in parts})


def test_a_given_frame_stays(cases, one_rank):
    case = cases("ti2v")
    first = case.inputs(one_rank)["latent"][:, :, :1]
    assert_close(ours(one_rank, case).tensor[:, :, :1], first, atol=1e-5, rtol=0.0)


def test_a_warm_up_changes_nothing(cases, two_ranks):
    for name in ("wan 2.2", "ti2v"):
        two_ranks.free()
        result = ours(two_ranks, cases(name), warm_up=True)
        assert "warm up" in result.seconds
        assert_close(result.tensor, cases(name).expected, **TOLERANCE)


def test_two_videos_of_one_image(cases, one_rank):
    """Image and mask serve each of them."""
    case = cases("first and last frame")
    inputs = case.inputs(one_rank)
    twice = {name: changed(inputs[name], lambda tensor: tensor.repeat(2, *[1] * (tensor.ndim - 1)))
             for name in ("positive", "negative")}  # fmt: skip
    latent = inputs["latent"].repeat(2, 1, 1, 1, 1)
    both = ours(one_rank, case, latent=latent).tensor
    assert_close(both, ours(one_rank, case, latent=latent, **twice).tensor, atol=1e-6, rtol=0.0)
    assert (both[0] - both[1]).abs().max() > 0.1


def test_without_an_image_all_is_unknown_and_zeros(cases, one_rank):
    """As in core ComfyUI, which runs a model of Wan 2.2 so."""
    case = cases("wan 2.2")
    inputs = case.inputs(one_rank)
    mean = torch.tensor(case.pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    zeros = {"concat_latent": mean.expand_as(inputs["latent"]), "concat_mask": torch.ones(1, 1, 3, 8, 12)}
    texts = {name: inputs[name].text for name in ("positive", "negative")}
    said = {name: Conditioning(text=text, **zeros) for name, text in texts.items()}
    assert_close(ours(one_rank, case, **texts).tensor, ours(one_rank, case, **said).tensor, atol=1e-6, rtol=0.0)


def test_a_text_longer_than_512_tokens_is_read_whole(cases, one_rank):
    case = cases("wan 2.2")
    inputs = case.inputs(one_rank)
    text = torch.randn(1, 700, tiny_models.TEXT_DIM, generator=torch.Generator().manual_seed(3))
    cut, whole = (
        ours(one_rank, case, positive=Conditioning(text=t, concat_latent=inputs["positive"].concat_latent)).tensor
        for t in (text[:, :512], text)
    )
    assert (cut - whole).abs().max() > 1e-3


# A video of which a part is known, with a model that is told by no timestep: core ComfyUI's way


def test_a_known_part_is_as_noisy_as_the_rest(one_rank, specs):
    """The network sees it under the job's own noise, and it comes out as it was given."""
    generator = torch.Generator().manual_seed(4)
    latent = torch.randn(1, 16, 3, 8, 8, generator=generator)
    mask = torch.ones(1, 1, 3, 8, 8)
    mask[..., :4] = 0
    spec = SampleSpec(seed=1, steps=3, guidance_scale=1.0)
    made = one_rank.sample(specs.model, spec, latent, specs.text(1), noise_mask=mask).tensor
    free = one_rank.sample(specs.model, spec, latent, specs.text(1)).tensor
    assert_close(made[..., :4], latent[..., :4], atol=1e-5, rtol=0.0)
    assert (made[..., 4:] - free[..., 4:]).abs().max() > 1e-3, "the known part has no influence on the rest"


# What is refused

NAN = float("nan")


@pytest.mark.parametrize("name, part, value, says", [
    ("wan 2.1", "clip_vision", None, ["needs a clip_vision_output", "Connect CLIP Vision Encode"]),
    ("wan 2.1", "clip_vision", torch.zeros(1, 257, 99), ["[1, 257, 99]", "[1, tokens, 40]", "clip_vision_h"]),
    ("first and last frame", "clip_vision", torch.zeros(1, 257, 40), ["257 tokens", "514", "of both"]),
    ("wan 2.2", "clip_vision", torch.zeros(1, 257, 40), ["does not use one", "Disconnect"]),
    ("wan 2.2", "concat_mask", torch.zeros(1, 1, 2, 8, 12), ["[1, 1, 2, 8, 12]", "[1, 1, 3, 8, 12] or [1, 4, 3"]),
    ("wan 2.2", "concat_mask", torch.zeros(1, 2, 3, 8, 12), ["[1, 2, 3, 8, 12]", "same node"]),
    ("wan 2.2", "concat_latent", torch.zeros(1, 48, 3, 8, 12), ["[1, 48, 3, 8, 12]", "[1, 16, 3, 8, 12]", "VAE"]),
    ("wan 2.2", "concat_latent", torch.full((1, 16, 3, 8, 12), NAN), ["concat_latent has NaN"]),
    ("ti2v", "concat_latent", torch.zeros(1, 48, 3, 4, 6), ["carries an image (concat_latent)", "36 in_channels"]),
])  # fmt: skip
def test_conditioning_that_does_not_fit(cases, two_ranks, name, part, value, says):
    case, pids = cases(name), two_ranks.pids
    given = case.inputs(two_ranks)["negative"]
    given = Conditioning(text=given) if isinstance(given, torch.Tensor) else given
    with pytest.raises(ValueError) as error:
        ours(two_ranks, case, negative=replace(given, **{part: value}))
    assert not [words for words in [*says, "negative conditioning"] if words not in str(error.value)], error.value
    assert two_ranks.pids == pids


@pytest.mark.parametrize("entries, says", [
    ({"numbers": {"guidance": 6.0}}, "carries guidance, which this model does not use"),
    ({"tensors": {"ref_latent": torch.zeros(1)}, "numbers": {"a": 1.0, "b": None}}, "carries a, ref_latent, which"),
])  # fmt: skip
def test_a_further_entry_that_the_model_does_not_use(two_ranks, specs, entries, says):
    text, pids = specs.text(1), two_ranks.pids
    with pytest.raises(ValueError, match=f"The negative conditioning {says}.* Connect the output of a text encode"):
        two_ranks.sample(specs.model, SampleSpec(steps=1), torch.zeros(1, 16, 1, 4, 4), text,
                         Conditioning(text=text, **entries))  # fmt: skip
    assert two_ranks.pids == pids


def test_a_further_entry_that_is_none_asks_for_nothing(one_rank, specs):
    text, spec = specs.text(1), SampleSpec(steps=1, guidance_scale=1.0)
    given = Conditioning(text=text, numbers={"guidance": None})
    made = [one_rank.sample(specs.model, spec, torch.zeros(1, 16, 1, 4, 4), one).tensor for one in (text, given)]
    assert torch.equal(*made)


def test_a_noise_mask_of_another_size(two_ranks, specs):
    latent, mask = torch.zeros(1, 16, 1, 4, 4), torch.ones(1, 1, 1, 32, 32)
    with pytest.raises(ValueError, match=r"noise_mask has the shape \[1, 1, 1, 32, 32\].*\[1, 1, 1, 4, 4\]"):
        two_ranks.sample(specs.model, SampleSpec(guidance_scale=1.0), latent, specs.text(1), noise_mask=mask)


@pytest.mark.parametrize("size, says", [
    ((5, 6), "height is 80, as the latent has 5 rows; .* multiple of 32. The nearest are 64 and 96"),
    ((4, 7), "width is 112, as the latent has 7 columns; .* multiple of 32. The nearest are 96 and 128"),
])  # fmt: skip
def test_a_latent_that_cannot_be_cut_into_patches(cases, two_ranks, size, says):
    specs, latent = cases("ti2v").specs, torch.zeros(1, 48, 3, *size)
    with pytest.raises(ValueError, match=says):
        two_ranks.sample(specs.model, SampleSpec(guidance_scale=1.0), latent, specs.text(1))


# A VAE's encoder


@pytest.mark.parametrize("name", ["wan 2.2", "ti2v"])
@pytest.mark.parametrize("frames", [1, 9])
def test_encoded_frames_equal_diffusers(cases, two_ranks, name, frames):
    case = cases(name)
    video = torch.rand(frames, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(frames))
    told = []
    latent = two_ranks.encode_video(case.specs.vae, video, on_progress=lambda *news: told.append(news)).tensor
    with torch.no_grad():
        expected = case.pipeline.vae.encode(video.movedim(-1, 0)[None] * 2 - 1).latent_dist.mode()
    assert_close(latent, expected, atol=1e-4, rtol=0.0)
    total = (frames - 1) // 4 + 1
    assert [news for news in told if news[0] == "encode"] == [("encode", n, total) for n in range(1, total + 1)]


def test_encoding_is_cancelled_between_two_frames(cases, two_ranks):
    case, told = cases("wan 2.2"), []

    def on_progress(stage, frame, total):
        told.append((stage, frame))
        if stage == "encode":
            two_ranks.cancel()

    pids = two_ranks.pids
    with pytest.raises(JobCancelled):
        two_ranks.encode_video(case.specs.vae, torch.rand(41, HEIGHT, WIDTH, 3), on_progress=on_progress)
    assert ("encode", 11) not in told
    assert two_ranks.encode_video(case.specs.vae, torch.rand(1, HEIGHT, WIDTH, 3)).tensor.shape == (1, 16, 1, 8, 12)
    assert two_ranks.pids == pids


@pytest.mark.parametrize("frames, says", [
    (torch.zeros(4, 64, 64, 3), ["4 frames", "4n+1", "1 and 5"]),
    (torch.zeros(1, 60, 64, 3), ["height is 60", "multiple of 8", "56 and 64"]),
    (torch.zeros(64, 64, 3), ["[64, 64, 3]", "[T,H,W,3]"]),
    (torch.full((1, 64, 64, 3), NAN), ["NaN"]),
])  # fmt: skip
def test_frames_that_cannot_be_encoded(one_rank, specs, frames, says):
    with pytest.raises(ValueError) as error:
        one_rank.encode_video(specs.vae, frames)
    assert not [words for words in says if words not in str(error.value)], error.value


def test_the_boundary_of_a_model_that_names_none(cases):
    """Where the original's experts meet: at 0.9 in image-to-video, at 0.875 in text-to-video."""
    found = [find_transformer(str(cases(name).specs.folder)) for name in ("wan 2.2", "ti2v")]
    spec = cases("wan 2.2").specs.model
    files = [dataclasses.replace(component, folder=None) for component in found]  # nothing lies beside them
    own = [defaults_of(component.config, experts=2) for component in found]
    assert [boundary_of(spec, *both) for both in zip(files, own)] == [0.9, 0.875]
    given = DiffusionModelSpec(path=spec.path, boundary=0.5)
    assert boundary_of(given, found[0], own[0]) == 0.5
    none = dataclasses.replace(own[0], boundary=None)
    with pytest.raises(ValueError, match="low-noise expert have no boundary, .* Set the boundary, such as 0.875"):
        boundary_of(spec, files[0], none, experts=2)
    assert boundary_of(spec, files[0], none, experts=1) == 0
