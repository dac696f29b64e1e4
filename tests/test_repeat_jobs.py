"""Weights stay: what a job changes decides what is read again from disk. The kernel tells which files are opened."""

import json
import os
import shutil
import time

import original_formats
import pytest
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.checkpoints.layout import find_text_encoder, find_transformer, find_vae
from benchmarks.opens import Opened
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

SHAPE = (1, 16, 2, 4, 6)


@pytest.fixture
def own(checkpoints, specs_of, tmp_path):
    """A checkpoint with two experts that is this test's alone, so that it is not loaded yet."""
    return specs_of(shutil.copytree(checkpoints(experts=2), tmp_path / "own"))


def weights(folder):
    return sorted(folder.rglob("*.safetensors"))


def whole_video(runtime, specs, prompt="a red ball", shape=SHAPE, parallel=None, **spec):
    """Encode, sample, decode: the frames, and the seconds of all stages."""
    texts = [runtime.encode(specs.encoder, text) for text in (prompt, "blurry")]
    embeddings = [text.tensor for text in texts]
    spec = SampleSpec(**{"steps": 2, "seed": 1, "guidance_scale": 5.0, "shift": 5.0, **spec})
    sampled = runtime.sample(specs.model, spec, torch.zeros(shape), *embeddings, parallel=parallel)
    decoded = runtime.decode(specs.vae, sampled.tensor)
    return decoded.tensor, texts[0].seconds, sampled.seconds, decoded.seconds


def test_a_second_job_reads_no_weights(two_ranks, own):
    with Opened(weights(own.folder)) as first:
        frames, *seconds = whole_video(two_ranks, own)
    assert {path.parent.name for path in first.files()} == {"text_encoder", "transformer", "transformer_2", "vae"}
    for stages, work in zip(seconds, ("encode", "denoise", "decode")):
        assert set(stages) == {"load", work} and all(value > 0 for value in stages.values()), stages

    with Opened(weights(own.folder)) as second:
        again, known, *seconds = whole_video(two_ranks, own)
        seconds.insert(0, two_ranks.encode(own.encoder, "another prompt").seconds)
    assert second.files() == []
    assert_close(again, frames, atol=1e-5, rtol=0.0)
    assert known == {}, "a prompt is encoded once"
    for stages, work in zip(seconds, ("encode", "denoise", "decode")):
        assert set(stages) == {"load", work} and stages["load"] < 0.1, stages


def test_a_changed_request_reads_no_weights(two_ranks, own):
    frames, *_ = whole_video(two_ranks, own)
    changes = [
        {"prompt": "a blue square"},
        {"seed": 2},
        {"guidance_scale": 2.0},
        {"solver": "euler", "schedule": "simple"},
        {"shape": (1, 16, 1, 6, 4)},
        {"shape": (2, *SHAPE[1:])},
        {"parallel": ParallelSpec(ranks=2, cfg_degree=1, ulysses_degree=2), "seed": 3},
        {"guidance_scale": 1.0},
    ]
    for change in changes:
        with Opened(weights(own.folder)) as opened:
            changed, *_ = whole_video(two_ranks, own, **change)
        assert opened.files() == [], change
        assert changed.shape != frames.shape or (changed - frames).abs().max() > 1e-4, f"{change} changed nothing"


def test_a_changed_file_is_read_again(two_ranks, own):
    before, *_ = whole_video(two_ranks, own)
    path = own.folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] += 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    with Opened(weights(own.folder)) as opened:
        after, *_ = whole_video(two_ranks, own)
    assert {file.parent.name for file in opened.files()} == {"transformer", "transformer_2"}
    assert (after - before).abs().max() > 1e-3


def test_a_changed_config_is_read_again(two_ranks, own):
    before, *_ = whole_video(two_ranks, own)
    path = own.folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"eps": 1e-06', '"eps": 0.5'))
    after, *_ = whole_video(two_ranks, own)
    assert (after - before).abs().max() > 1e-3


def test_a_changed_config_of_the_original_is_read_again(one_rank, tmp_path):
    tensors = load_file(random_wan.original_transformer(tmp_path / "wan.safetensors", layers=1))
    folder = original_formats.original_folder(tmp_path / "original", tensors)
    spec, text = SampleSpec(steps=1, seed=1, guidance_scale=1.0, solver="euler"), torch.ones(1, 8, random_wan.TEXT_DIM)
    made = []
    for heads in (2, 1):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_heads": heads}))
        model = DiffusionModelSpec(path=str(folder))
        made.append(one_rank.sample(model, spec, torch.zeros(SHAPE), text).tensor)
    assert (made[1] - made[0]).abs().max() > 1e-3


@pytest.mark.parametrize("find, names", [
    (find_transformer, ["transformer/config.json", "model_index.json", "vae/config.json", "vae/latent_rgb.json"]),
    (find_text_encoder, ["text_encoder/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
                         "tokenizer/added_tokens.json"]),
    (find_vae, ["vae/config.json"]),
])  # fmt: skip
def test_every_file_beside_the_weights_is_looked_at(own, find, names):
    """Changed, or put there: what is loaded is another component then (tests above and of prompts see it happen)."""
    for name in names:
        before = find(str(own.folder)).fingerprint
        assert before == find(str(own.folder)).fingerprint
        file = own.folder / name
        file.write_text(file.read_text() + "\n" if file.exists() else "{}")
        assert before != find(str(own.folder)).fingerprint, name


def test_another_model_takes_the_place_of_the_first(two_ranks, own, specs):
    first, *_ = whole_video(two_ranks, own)
    other, *_ = whole_video(two_ranks, specs)
    assert (first - other).abs().max() > 1e-3
    with Opened(weights(own.folder)) as opened:
        again, *_ = whole_video(two_ranks, own)
        two_ranks.encode(own.encoder, "another prompt")  # both of the video's are known
    assert len({file.parent.name for file in opened.files()}) == 4, "one slot a kind: the first had to go"
    assert_close(again, first, atol=1e-5, rtol=0.0)


def test_free_drops_the_weights_and_keeps_the_ranks(two_ranks, own):
    frames, *_ = whole_video(two_ranks, own)
    pids = two_ranks.pids
    two_ranks.free()
    with Opened(weights(own.folder)) as opened:
        again, *_ = whole_video(two_ranks, own)
    assert opened.files() and two_ranks.pids == pids
    assert_close(again, frames, atol=1e-5, rtol=0.0)


def test_load_ahead_of_the_jobs(two_ranks, own):
    stages = two_ranks.load(own.model, own.encoder, own.vae).seconds
    assert set(stages) == {"load"} and stages["load"] > 0
    with Opened(weights(own.folder)) as opened:
        whole_video(two_ranks, own)
    assert opened.files() == []


def test_loads_are_reported_tensor_by_tensor(two_ranks, own):
    told = []
    two_ranks.load(own.model, on_progress=lambda *news: told.append(news))
    per_expert = len(load_file(weights(own.folder / "transformer")[0]))
    assert told == [("load", done, per_expert) for _ in range(2) for done in range(1, per_expert + 1)]


def test_a_single_file_is_opened_once(two_ranks, tmp_path):
    """Also where its config has to be read off the shapes in it."""
    path = random_wan.original_transformer(tmp_path / "wan.safetensors", layers=1)
    model = DiffusionModelSpec(path=str(path))
    spec = SampleSpec(steps=1, seed=1, guidance_scale=1.0, solver="euler", schedule="simple")
    text = torch.randn(1, 8, random_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    before = two_ranks.sample(model, spec, torch.zeros(SHAPE), text).tensor
    with Opened([path]) as opened:
        again = two_ranks.sample(model, spec, torch.zeros(SHAPE), text).tensor
    assert opened.files() == []
    assert torch.equal(again, before)

    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    with Opened([path]) as opened:
        two_ranks.sample(model, spec, torch.zeros(SHAPE), text)
    assert opened.files()

