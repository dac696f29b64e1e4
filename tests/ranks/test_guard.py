"""Numbers that go wrong in the ranks' memory are found where they do, by code; the ranks live, and the next job is
right to the bit (guard_rank.py)."""

import json

import gloo_ranks
import pytest

LOW = "low-noise expert"
BOTH = "positive prompt and negative prompt"
WEIGHT = "NaN or infinite values in blocks.1.ffn.net.2.weight"
# What goes wrong -> what the error says, on all ranks.
FAULTS = {
    "expert": ["AV-1602: Step 3 of 4", LOW, "negative prompt", WEIGHT, "transformer_2"],
    "expert, Ulysses": ["AV-1602: Step 3 of 4", LOW, BOTH, WEIGHT, "transformer_2"],
    "between steps": ["AV-1602: Step 2 of 4", "high-noise expert", BOTH, WEIGHT],
    "one rank": ["AV-1601: Step 3 of 4", "solver"],
    "cache": ["AV-1604: Step 3 of 4", LOW, "none without block cache", "interval"],
    "float16": ["AV-1601: Step 1 of 4", "high-noise expert", "in block 2 of 2", "dtype bfloat16", "65504"],
    "float16, text": ["AV-1603: Step 1 of 4", "positive prompt)", "'text'", "float16", "dtype bfloat16"],
    "call": ["AV-1602: Step 2 of 2", LOW, BOTH, WEIGHT, "transformer_2"],
    "VAE's weight": ["AV-1602: The decoded video", "frames 1 to 9 of 9", "rank", "decoder.conv_out.weight"],
    "VAE's video": ["AV-1603: The video to encode, in frame 9 of 9"],
    "VAE's large video": ["AV-1607", "latent's frame 3 of 3", "reaches 3e+38"],
}
WARNINGS = {
    "black": "AV-1608: Frames 1 to 9 of 9 are black",
    "grey": "AV-1608: Frames 1 to 9 of 9 are of one colour",
    "faded": "AV-1608: Frames 6 to 9 of 9 are black",
    "still": "AV-1609: All 9 frames are the same, though their latent changes",
}
LEGAL = ("short fade", "still latent", "bright object", "moving", "one frame", "still image")


@pytest.fixture(scope="module")
def all_said(checkpoints, tmp_path_factory):
    """The folder in which groups of 1 and of 2 ranks wrote what they said."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "model").symlink_to(checkpoints(experts=2))
    gloo_ranks.run("guard_rank.py", folder, 1, 2, timeout=240)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def said(request, all_said):
    """What each of so many ranks said."""
    ranks = request.param
    return [json.loads((all_said / f"guard-{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize("fault", FAULTS)
def test_numbers_that_go_wrong_are_found_there_by_code(said, fault):
    """On all ranks alike, also if only the last one has them: its branch is the negative one."""
    errors = [rank[fault] for rank in said]
    print(errors[0][1])
    assert all(error == errors[0] for error in errors) and errors[0][0] == "ValueError"
    assert [words for words in FAULTS[fault] if words not in errors[0][1]] == []
    if fault == "expert":
        assert ("positive prompt" in errors[0][1]) == (len(said) == 1)


def test_a_text_encoder_whose_weight_is_no_number_is_named(said):
    kind, text = said[0]["encoder"]
    assert kind == "ValueError" and "AV-1602: The text_encoder has NaN or infinite values in shared.weight" in text


@pytest.mark.parametrize("video", [*WARNINGS, *LEGAL])
def test_frames_of_one_colour_and_still_videos_are_warnings(said, video):
    """On rank 0, from extremes of all ranks; and none for what is legal."""
    warnings = said[0][video]
    assert not any(rank[video] for rank in said[1:])
    assert [text.startswith(WARNINGS[video]) for text in warnings] == [True] if video in WARNINGS else not warnings


def test_the_guard_is_one_reduction_over_the_latent_a_step(said):
    """On the CPU, whose solver has the latent there anyway; and it exchanges nothing of its own."""
    for rank in said:
        counts = rank["counts"]
        assert counts["of latents"] == {"aten::aminmax": 4}
        assert counts["missing"] == {} and set(counts["added"].values()) == {4}
        assert counts["exchanges"][0] == counts["exchanges"][1]
        assert bool(counts["exchanges"][0]) == (len(said) > 1)
