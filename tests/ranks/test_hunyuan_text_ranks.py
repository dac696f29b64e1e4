"""HunyuanVideo's prompts on ranks: text and a pooled vector, on one rank's CPU or on all ranks, once per prompt."""

import re

import hunyuan_encoders as encoders
import pytest
import tiny_llava
import torch
from ascend_runtime import JobCancelled, TextEncoderSpec
from hunyuan_encoders import Diffusers, image
from new_prompts import new_prompt
from torch.testing import assert_close

LLAMA, CLIP, VISION = 3, 2, 2  # layers that are run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model for image to video: it encodes prompts without an image too."""
    return tiny_llava.save(tmp_path_factory.mktemp("encoders"), images=True, seed=7)


@pytest.fixture(scope="module")
def theirs(folder):
    """By diffusers, by (prompt, interleave of the image): text and pooled."""
    pipeline = Diffusers(folder, images=True)
    return {(prompt, every): pipeline.encoded(prompt, image=encoders.as_pil(image()), image_embed_interleave=every)
            for prompt, every in (("a red ball", 2), ("", 4))}  # fmt: skip


class Stages:
    """The progress that each stage reported, from an `on_progress`."""

    def __init__(self):
        self.reports = {}

    def __call__(self, stage, step, total):
        self.reports.setdefault(stage, []).append((step, total))


def encode(runtime, folder, text, placement="ranks", **given):
    stages = Stages()
    result = runtime.encode(
        TextEncoderSpec(path=str(folder), placement=placement), text, on_progress=stages, **given
    )
    return result, stages.reports


@pytest.mark.parametrize("ranks, placement", [(1, "cpu"), (2, "ranks"), (4, "ranks"), (2, "cpu")])
def test_a_prompt_about_an_image_equals_diffusers_on_any_ranks(runtimes, folder, theirs, ranks, placement):
    for (prompt, every), (text, pooled) in theirs.items():
        result, reports = encode(
            runtimes(ranks), folder, prompt, placement, image=image()[None], image_interleave=every
        )
        assert_close(result.tensor, text, atol=2e-5, rtol=0)
        assert_close(result.tensors["pooled"], pooled, atol=1e-5, rtol=0)
        blocks = VISION + LLAMA + CLIP
        assert reports["encode"] == [(block, blocks) for block in range(1, blocks + 1)]
        assert {(done, total) for done, total in reports.get("load", ()) if done > total} == set()


@pytest.mark.parametrize("ranks, placement", [(2, "ranks"), (4, "ranks"), (2, "cpu")])
def test_a_prompt_equals_that_of_one_rank(runtimes, one_rank, folder, ranks, placement):
    for prompt in ("a red ball on a table", "", "x" * 300):
        expected, _ = encode(one_rank, folder, prompt, "cpu")
        result, reports = encode(runtimes(ranks), folder, prompt, placement)
        assert_close(result.tensor, expected.tensor, atol=2e-5, rtol=0)
        assert_close(result.tensors["pooled"], expected.tensors["pooled"], atol=1e-5, rtol=0)
        assert reports["encode"][-1] == (LLAMA + CLIP, LLAMA + CLIP)
        assert result.info.get("warnings") == expected.info.get("warnings")
    assert re.match("The prompt has 300 tokens, but HunyuanVideo reads 256: .* is cut off", *expected.info["warnings"])


@pytest.mark.parametrize("placement", ["cpu", "ranks"])
def test_a_prompt_is_encoded_once_for_each_image(two_ranks, folder, placement):
    prompt, seen = new_prompt(), {}
    given = {"none": {}, "one": {"image": image()}, "other": {"image": image(seed=4)},
             "every fourth": {"image": image(), "image_interleave": 4}}  # fmt: skip
    for name, one in given.items():
        seen[name], reports = encode(two_ranks, folder, prompt, placement, **one)
        assert "encode" in reports
    assert len({(len(x.tensor[0]), float(x.tensor.double().sum())) for x in seen.values()}) == 4
    for name, one in given.items():
        again, reports = encode(two_ranks, folder, f" {prompt}\n", placement, **one)
        assert reports == {} and again.info["prompt"] == "known"
        assert torch.equal(again.tensor, seen[name].tensor)
        assert torch.equal(again.tensors["pooled"], seen[name].tensors["pooled"])


def test_a_first_image_reads_the_text_encoders_no_second_time(two_ranks, folder):
    two_ranks.free()
    sizes = []
    for given in ({}, {"image": image()}, {"image": image(seed=9)}, {}):
        _, reports = encode(two_ranks, folder, new_prompt(), **given)
        sizes.append({total for _, total in reports.get("load", ())})
    text, vision, *later = sizes
    assert len(text) == len(vision) == 1 and text != vision and later == [set(), set()]


@pytest.mark.parametrize("block", [1, VISION + 1, VISION + LLAMA + CLIP])
def test_a_cancel_between_blocks_stops_all_ranks(two_ranks, folder, block):
    prompt, pids = new_prompt(), two_ranks.pids
    expected, _ = encode(two_ranks, folder, prompt, "cpu", image=image())

    def cancel(stage, step, total):
        if stage == "encode" and step == block:
            two_ranks.cancel()

    spec = TextEncoderSpec(path=str(folder), placement="ranks")
    try:
        two_ranks.encode(spec, prompt, image(), on_progress=cancel)
    except JobCancelled:
        pass
    else:  # the last block may be done before the cancel arrives
        assert block == VISION + LLAMA + CLIP
    again, _ = encode(two_ranks, folder, prompt, image=image())
    assert two_ranks.pids == pids
    assert_close(again.tensor, expected.tensor, atol=2e-5, rtol=0)


WRONG = {
    "half a character": (dict(text="\ud83d"), "half a character"),
    "10 MB": (dict(text="a" * 10_000_000), "The prompt has 10,000,000 characters"),
    "bytes": (dict(image=torch.zeros(4, 4, 3, dtype=torch.uint8)), "image is torch.uint8; .* image.float"),
    "no channels": (dict(image=torch.zeros(4, 4)), r"image has the shape \[4, 4\]; it must be \[H,W,3\]"),
    "two images": (dict(image=torch.zeros(2, 4, 4, 3)), r"\[2, 4, 4, 3\]"),
    "NaN": (dict(image=torch.full((4, 4, 3), torch.nan)), "image.*NaN"),
    "narrow": (dict(image=torch.zeros(2, 300, 3)), "300 x 2 pixels"),
    "interleave": (dict(image=torch.zeros(4, 4, 3), image_interleave=0), "image_interleave is 0; .* from 1 to 512"),
}


@pytest.mark.parametrize("case, placement", [*((case, "ranks") for case in WRONG), ("NaN", "cpu"), ("narrow", "cpu")])
def test_what_cannot_be_encoded_is_refused_by_name(two_ranks, folder, case, placement):
    given, says = WRONG[case]
    pids = two_ranks.pids
    with pytest.raises(ValueError, match=f"(?s){says}"):
        encode(two_ranks, folder, **{"text": "a cat", **given}, placement=placement)
    assert two_ranks.ping().seconds == {} and two_ranks.pids == pids


def test_a_model_without_a_vision_tower_reads_no_image(two_ranks, specs, folder, tmp_path):
    with pytest.raises(ValueError, match="The text encoder of Wan models reads no images. Encode the prompt without"):
        two_ranks.encode(specs.encoder, "a cat", image())
    text_only = tiny_llava.save(tmp_path, seed=8)
    with pytest.raises(ValueError, match="has no LLaVA vision tower, such as .* Give one as vision_path"):
        two_ranks.encode(TextEncoderSpec(path=str(text_only)), "a cat", image())
    spec = TextEncoderSpec(path=str(text_only), vision_path=str(folder / "text_encoder" / "model.safetensors"))
    assert two_ranks.encode(spec, "a cat", image()).tensor.shape[1] > 288
