"""Weights stay: what a job changes decides what is read again from disk. The kernel tells which files are opened."""

import json
import os
import shutil
import time
from functools import partial

import original_formats
import pytest
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, SampleSpec
from ascend_runtime.recognition.layout import find_part, find_transformer, find_vae
from ascend_runtime.components import Components
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
    (partial(find_part, part="text_encoder"), ["text_encoder/config.json", "tokenizer/tokenizer.json",
                                               "tokenizer/tokenizer_config.json", "tokenizer/added_tokens.json"]),
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
    """Of text encoders and VAEs. Of diffusion models, two stay."""
    first, *_ = whole_video(two_ranks, own)
    other, *_ = whole_video(two_ranks, specs)
    assert (first - other).abs().max() > 1e-3
    with Opened(weights(own.folder)) as opened:
        again, *_ = whole_video(two_ranks, own)
        two_ranks.encode(own.encoder, "another prompt")  # both of the video's are known
    assert {file.parent.name for file in opened.files()} == {"text_encoder", "vae"}
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


@pytest.fixture
def told_of_loading(two_ranks):
    """`told_of_loading(model)`: (bytes done, bytes) after each tensor, of one run from 0 to all."""

    def load(model, **plan):
        told = []
        two_ranks.load(model, parallel=ParallelSpec(ranks=2, **plan), on_progress=lambda *news: told.append(news))
        stages, done, totals = zip(*told)
        assert set(stages) == {"load"} and len(set(totals)) == 1 and done[-1] == totals[0]
        assert all(before < after for before, after in zip((0, *done), done))
        return list(zip(done, totals))

    return load


def test_loads_are_reported_in_bytes_of_all_experts(own, told_of_loading):
    on_disk = [load_file(weights(own.folder / name)[0]) for name in ("transformer", "transformer_2")]
    nbytes = sum(tensor.nbytes for expert in on_disk for tensor in expert.values())
    for plan in ({}, {"fsdp": True}):
        told = told_of_loading(own.model, **plan)
        assert told[-1] == (nbytes, nbytes) and len(told) == sum(map(len, on_disk)), plan


def test_loras_are_reported_with_what_they_change(own, told_of_loading, tmp_path):
    name = "blocks.0.attn1.to_q"
    weight = load_file(weights(own.folder / "transformer")[0])[f"{name}.weight"]
    save_file({f"{name}.diff": torch.ones_like(weight)}, tmp_path / "lora.safetensors")
    lora = LoraSpec(path=str(tmp_path / "lora.safetensors"))
    (*_, (base, _)) = told_of_loading(own.model)
    assert told_of_loading(own.model.with_lora(lora)) == [(weight.nbytes * n, weight.nbytes * 2) for n in (1, 2)]
    assert told_of_loading(own.model) == [(weight.nbytes * n, weight.nbytes * 2) for n in (1, 2)], "taken out again"
    assert told_of_loading(own.model.with_lora(lora), fsdp=True)[-1][0] == base + 2 * weight.nbytes


def test_nothing_is_read_before_all_is_known_to_fit(one_rank, own, tmp_path):
    """A low-noise expert with a tensor too many; a LoRA of another model."""
    told = []
    save_file({"blocks.99.attn1.to_q.diff": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA for this model"):
        one_rank.load(own.model.with_lora(LoraSpec(path=str(tmp_path / "lora.safetensors"))),
                      on_progress=lambda *news: told.append(news))  # fmt: skip
    (path,) = weights(own.folder / "transformer_2")
    save_file(load_file(path) | {"one.more": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="transformer_2.* 1 unexpected: one.more"):
        one_rank.load(own.model, on_progress=lambda *news: told.append(news))
    assert told == []


@pytest.mark.parametrize("kind", ["model", "encoder", "vae", "lora"])
def test_what_changes_while_it_is_read_is_not_kept(own, tmp_path, kind):
    file, components = tmp_path / "lora.safetensors", Components(torch.device("cpu"))
    save_file({"proj_out.diff_b": torch.ones(64), "blocks.0.attn1.to_q.diff_b": torch.ones(96)}, file)
    spec = getattr(own, "model" if kind == "lora" else kind)
    if kind == "lora":
        components.get(spec, lambda *_: None)
        spec = spec.with_lora(LoraSpec(path=str(file)))
    else:
        file = weights(own.folder / {"model": "transformer_2", "encoder": "text_encoder", "vae": "vae"}[kind])[0]
    before = load_file(file)

    def rewritten(done, total):
        save_file({name: tensor * 0.5 for name, tensor in before.items()}, tmp_path / "new")
        os.replace(tmp_path / "new", file)

    with pytest.raises(ValueError, match="changed while it was read. Run the job again"):
        components.get(spec, rewritten)
    expected = Components(torch.device("cpu")).get(spec, lambda *_: None)
    loaded, again = components.get(spec, lambda *_: None), lambda one: [one.low_noise, one.high_noise]
    encoder, vae = lambda one: [one.encoders["text_encoder"].model], lambda one: [one.network]
    networks = {"encoder": encoder, "vae": vae}.get(kind, again)
    for network, wanted in zip(networks(loaded), networks(expected)):
        for (name, parameter), right in zip(network.named_parameters(), wanted.parameters()):
            assert torch.equal(parameter, right), name


@pytest.mark.parametrize("boundary", ['"abc"', "[0.9]", "-3", "5", "true"])
def test_a_boundary_that_is_none_is_refused(own, boundary):
    path = own.folder / "model_index.json"
    index = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**index, "boundary_ratio": json.loads(boundary)}))
    with pytest.raises(ValueError, match="model_index.json has the boundary_ratio .* number from 0 to 1"):
        Components(torch.device("cpu")).get(own.model, lambda *_: None)
    given = DiffusionModelSpec(path=own.model.path, boundary=0.5)
    assert Components(torch.device("cpu")).get(given, lambda *_: None).boundary == 0.5


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

