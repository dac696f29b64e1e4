"""The text encoder on all ranks, its weights shared, says what it says on one rank's CPU."""

import json
import shutil

import gloo_ranks
import hunyuan_encoders
import pytest
import tiny_llava
import tiny_models
import torch
from ascend_runtime import JobCancelled, TextEncoderSpec
from ascend_runtime.hardware.environment import placed
from new_prompts import new_prompt
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

LAYERS = 60
CUT = new_prompt()
PROMPTS = ("a red circle moving right on a blue background", "", CUT)
NAMES = {"shared": ["shared.weight"], "embed_tokens": ["encoder.embed_tokens.weight"],
         "both": ["shared.weight", "encoder.embed_tokens.weight"]}  # fmt: skip


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints(text_layers=3)


@pytest.fixture(scope="module")
def expected(one_rank, folder):
    """The embedding of each prompt by one rank's CPU."""
    made = {text: one_rank.encode(encoder(folder, "cpu"), text).tensor for text in PROMPTS}
    assert made[PROMPTS[0]].std() > 0.01
    assert not torch.allclose(made[PROMPTS[0]], made[PROMPTS[2]])
    return made


def encoder(folder, placement="ranks"):
    return TextEncoderSpec(path=str(folder), placement=placement)


class Stages:
    """How often each stage was told of, from an `on_progress`."""

    def __init__(self):
        self.told = {}

    def __call__(self, stage, step, total):
        self.told.setdefault(stage, []).append((step, total))


def encode(runtime, spec, text=PROMPTS[0]):
    """The embedding, and the stages that were told of."""
    stages = Stages()
    return runtime.encode(spec, text, on_progress=stages).tensor, stages.told


def assert_same(embedding, expected):
    assert_close(embedding, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_any_number_of_ranks_equals_the_cpu(runtimes, folder, expected, ranks):
    """3 ranks share rows unevenly: no width divides by 3."""
    for text, embedding in expected.items():
        made, told = encode(runtimes(ranks), encoder(folder), text)
        assert_same(made, embedding)
        assert told["encode"] == [(block, 3) for block in (1, 2, 3)]


@pytest.mark.parametrize("placement", ("cpu", "ranks"))
@pytest.mark.parametrize("names", NAMES)
def test_the_embedding_goes_by_either_name(two_ranks, folder, expected, tmp_path, names, placement):
    shutil.copytree(folder / "text_encoder", tmp_path / "text_encoder")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    embedding = [tensors.pop(name) for name in NAMES["both"] if name in tensors][0]
    save_file(tensors | {name: embedding.clone() for name in NAMES[names]}, file)
    assert_same(encode(two_ranks, encoder(tmp_path, placement))[0], expected[PROMPTS[0]])


def test_a_file_without_the_embedding_is_refused(two_ranks, folder, tmp_path):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(folder / part, tmp_path / part)
    file = tmp_path / "text_encoder" / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if name not in NAMES["both"]}, file)
    with pytest.raises(ValueError, match="2 missing: shared.weight, encoder.embed_tokens.weight"):
        two_ranks.encode(encoder(tmp_path), "")


def test_read_once_for_all_jobs_of_a_placement(two_ranks, folder, expected):
    two_ranks.free()
    for placement in ("ranks", "cpu", "ranks"):
        for first in (True, False):
            made, told = encode(two_ranks, encoder(folder, placement), new_prompt())
            assert ("load" in told) == first
            assert_same(made, expected[CUT])


def test_loaded_ahead_and_freed(two_ranks, folder, expected):
    two_ranks.free()
    two_ranks.load(encoder=encoder(folder))
    assert set(encode(two_ranks, encoder(folder), new_prompt())[1]) == {"encode"}
    two_ranks.free()
    made, told = encode(two_ranks, encoder(folder), new_prompt())
    assert "load" in told
    assert_same(made, expected[CUT])


def test_a_cancel_between_blocks_stops_all_ranks(two_ranks, checkpoints):
    folder = checkpoints(text_layers=LAYERS)
    pids, (uncancelled, _) = two_ranks.pids, encode(two_ranks, encoder(folder), new_prompt())
    for block in (1, 2, LAYERS // 2):
        reached = []

        def cancel_at(stage, step, total):
            if stage == "encode":
                reached.append(step)
                if step == block:
                    two_ranks.cancel()

        with pytest.raises(JobCancelled):
            two_ranks.encode(encoder(folder), new_prompt(), on_progress=cancel_at)
        assert reached[-1] < LAYERS
        again, told = encode(two_ranks, encoder(folder), new_prompt())
        assert set(told) == {"encode"} and two_ranks.pids == pids
        assert torch.equal(again, uncancelled)


def test_on_a_cpu_no_variable_decides_where_the_spec_is_auto(new_runtime, folder, expected):
    with new_runtime(2, T5_LOAD_CPU="0") as runtime:
        assert_same(encode(runtime, encoder(folder, "auto"))[0], expected[PROMPTS[0]])
        assert set(encode(runtime, encoder(folder, "cpu"), PROMPTS[1])[1]) == {"encode"}
        assert "load" in encode(runtime, encoder(folder, "ranks"))[1]


@pytest.mark.parametrize("environ, chosen", [
    ({}, "cpu"), ({"T5_LOAD_CPU": "1"}, "cpu"), ({"T5_LOAD_CPU": "0"}, "ranks"),
])  # fmt: skip
def test_a_given_placement_goes_before_the_variable(environ, chosen):
    assert placed(TextEncoderSpec(path="/x"), environ).placement == chosen
    for given in ("cpu", "ranks"):
        assert placed(TextEncoderSpec(path="/x", placement=given), environ).placement == given
    with pytest.raises(ValueError, match="T5_LOAD_CPU is 'yes'"):
        placed(TextEncoderSpec(path="/x"), {"T5_LOAD_CPU": "yes"})


def test_another_placement_is_refused():
    with pytest.raises(ValueError, match="placement is 'gpu'; it can be one of auto, cpu, ranks"):
        TextEncoderSpec(path="/x", placement="gpu")


def test_a_rank_keeps_a_share_and_gathers_each_weight_once(tmp_path):
    layers, ranks = 3, 2
    pipeline = tiny_models.wan_pipeline(text_layers=layers)
    folder = tiny_models.save(pipeline, tmp_path / "model")
    gloo_ranks.run("encoder_rank.py", folder, ranks)
    everything = sum(p.nbytes for p in pipeline.text_encoder.parameters())
    block = sum(p.nbytes for p in pipeline.text_encoder.encoder.block[0].parameters())
    for rank in range(ranks):
        told = json.loads((folder / f"told-{rank}.json").read_text())
        assert told["share"] == everything / ranks
        assert told["gathers"] == layers + 2  # the embedding, and what is in no block: the last norm
        assert told["during"] >= told["share"] + block, "the test sees what is gathered"
        assert told["after"] == told["broken off"] == told["share"]


def test_a_rank_keeps_a_share_of_both_text_encoders(tmp_path):
    """Of a model that has two. No layer that is not read is held, or gathered."""
    ranks, folder = 2, tiny_llava.save(tmp_path / "model", seed=4)
    gloo_ranks.run("encoder_rank.py", folder, ranks)
    networks = [one.model for one in hunyuan_encoders.load(folder).encoders.values()]
    everything = sum(p.nbytes for network in networks for p in network.parameters())
    layer = sum(p.nbytes for p in networks[0].layers[0].parameters())
    for rank in range(ranks):
        told = json.loads((folder / f"told-{rank}.json").read_text())
        assert abs(told["share"] - everything / ranks) < 0.05 * everything  # some rows are odd in number
        assert told["gathers"] == (1 + 3) + (1 + 2 + 1)  # embeddings, layers, and CLIP's last norm
        assert told["share"] + layer <= told["during"] < 0.9 * everything
        assert told["after"] == told["broken off"] == told["share"]
