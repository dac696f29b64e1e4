"""A prompt is encoded once, and then needs no encoder. An encoder's blocks tell when they compute, the kernel which
files are opened."""

import json
import re
import shutil
import time

import pytest
import torch
from ascend_runtime import JobCancelled, TextEncoderSpec
from ascend_runtime.client.arguments import MAX_PROMPT_CHARACTERS, check_prompt
from ascend_runtime.engine.prompts import KNOWN_PROMPTS
from benchmarks.opens import Opened
from new_prompts import new_prompt
from safetensors.torch import load_file, save_file

PLACEMENTS = pytest.mark.parametrize("placement", ("cpu", "ranks"))


@pytest.fixture
def own(checkpoint, tmp_path):
    """A text encoder that is this test's alone, so that it is not loaded yet."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(checkpoint / part, tmp_path / part)
    return tmp_path


def encode(runtime, folder, text, placement="cpu", **changes):
    """The embedding, and which stages ranks told of."""
    told = []
    spec = TextEncoderSpec(path=str(folder), placement=placement, **changes)
    result = runtime.encode(spec, text, on_progress=lambda stage, *_: told.append(stage))
    assert set(result.seconds) - {"load"} == set(told) - {"load"}
    assert (result.info.get("prompt") == "known") == (told == [])
    return result.tensor, set(told)


@PLACEMENTS
def test_a_prompt_is_encoded_once(one_rank, two_ranks, own, placement):
    first, told = encode(two_ranks, own, "a red ball", placement)
    assert told == {"load", "encode"} and first.std() > 0.01
    for negative in ("blurry", "dark"):
        other, told = encode(two_ranks, own, negative, placement)
        assert told == {"encode"} and not torch.equal(other, first)
        again, told = encode(two_ranks, own, " a red\nball ", placement)  # which is cleaned to the same
        assert told == set() and torch.equal(again, first)
    alone, _ = encode(one_rank, own, "a red ball")
    torch.testing.assert_close(alone, first, atol=1e-5, rtol=0.0)


@PLACEMENTS
def test_a_known_prompt_needs_no_encoder(two_ranks, own, placement):
    first, _ = encode(two_ranks, own, "a red ball", placement)
    two_ranks.free()
    with Opened(file for file in own.rglob("*") if file.is_file() and file.name != "config.json") as opened:
        again, told = encode(two_ranks, own, "a red ball", placement)
    assert opened.files() == [] and told == set() and torch.equal(again, first)
    assert encode(two_ranks, own, "a blue ball", placement)[1] == {"load", "encode"}


@PLACEMENTS
def test_a_prompt_that_is_cut_says_so_each_time(two_ranks, own, placement, caplog):
    """Also where it is known; in the log once."""
    caplog.set_level("WARNING", logger="ascend_runtime")
    text = new_prompt() + " red circle" * (200 + len(placement))
    spec = TextEncoderSpec(path=str(own), placement=placement)
    first, again = (two_ranks.encode(spec, text) for _ in range(2))
    (said,) = first.info["warnings"]
    assert re.match(r"The prompt has \d{3,5} tokens, but Wan reads 512: the text after '... .* is cut off", said)
    assert again.info == {"prompt": "known", "warnings": [said]} and torch.equal(first.tensor, again.tensor)
    assert caplog.messages.count(said) == 1


def test_a_text_of_many_characters_is_refused_before_it_is_cut_into_tokens(two_ranks, own):
    pids, began = two_ranks.pids, time.monotonic()
    with pytest.raises(ValueError, match="The prompt has 10,000,000 characters; at most 50,000 are accepted"):
        two_ranks.encode(TextEncoderSpec(path=str(own)), "a" * 10_000_000)
    assert time.monotonic() - began < 5 and two_ranks.pids == pids
    check_prompt("a" * MAX_PROMPT_CHARACTERS)
    with pytest.raises(ValueError, match="Shorten it"):
        check_prompt("a" * (MAX_PROMPT_CHARACTERS + 1))


def test_what_else_decides_the_result_is_told_apart(two_ranks, own):
    made = [encode(two_ranks, own, "a red ball", **changes)
            for changes in ({}, {"dtype": "bfloat16"}, {"placement": "ranks"})]  # fmt: skip
    assert [told for _, told in made] == [{"load", "encode"}] * 3
    assert not torch.equal(made[0][0], made[1][0])
    again, told = encode(two_ranks, own, "a red ball", dtype="bfloat16")
    assert told == set() and torch.equal(again, made[1][0])


def test_of_too_many_the_one_goes_that_was_asked_for_the_longest_ago(one_rank, own):
    prompts = [f"{number} balls" for number in range(KNOWN_PROMPTS)]
    for text in (*prompts, prompts[0], "one more"):
        encode(one_rank, own, text)
    assert KNOWN_PROMPTS == 16
    known = [encode(one_rank, own, text)[1] == set() for text in (prompts[0], "one more", *prompts[2:])]
    assert all(known)
    assert encode(one_rank, own, prompts[1])[1] == {"encode"}


def test_other_weights_encode_anew(one_rank, own):
    before, _ = encode(one_rank, own, "a red ball")
    file = own / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    after, told = encode(one_rank, own, "a red ball")
    assert told == {"load", "encode"}
    torch.testing.assert_close(after, 2 * before, atol=1e-4, rtol=0.0)


def test_another_tokenizer_encodes_anew(one_rank, own):
    before, _ = encode(one_rank, own, "a red ball")
    file = own / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[10:] = vocabulary[10:][::-1]
    file.write_text(json.dumps(content))
    after, told = encode(one_rank, own, "a red ball")
    assert told == {"load", "encode"} and not torch.equal(after, before)


@PLACEMENTS
def test_a_prompt_that_was_cancelled_is_not_known(two_ranks, checkpoints, placement):
    own = checkpoints(text_layers=60)  # so that it is cancelled in time
    text, spec = new_prompt(), TextEncoderSpec(path=str(own), placement=placement)
    expected, _ = encode(two_ranks, own, new_prompt(), placement)
    with pytest.raises(JobCancelled):
        two_ranks.encode(spec, text, on_progress=lambda *_: two_ranks.cancel())
    again, told = encode(two_ranks, own, text, placement)
    assert told == {"encode"} and torch.equal(again, expected)
    assert encode(two_ranks, own, text, placement)[1] == set()


def test_a_wrong_request_for_a_known_prompt(two_ranks, own):
    """The files are gone: rank 0 alone looks, and no rank is left in an exchange."""
    encode(two_ranks, own, "a red ball")
    pids = two_ranks.pids
    shutil.rmtree(own / "text_encoder")
    with pytest.raises(ValueError, match="has no text_encoder/config.json"):
        encode(two_ranks, own, "a red ball")
    assert two_ranks.ping().seconds == {} and two_ranks.pids == pids


def test_new_ranks_know_nothing(one_rank, own):
    before, _ = encode(one_rank, own, "a red ball")
    one_rank.stop()
    after, told = encode(one_rank, own, "a red ball")
    assert told == {"load", "encode"} and torch.equal(after, before)
