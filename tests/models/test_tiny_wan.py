"""The embedded model: its world, its reader, what training relies on, and the committed folder."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "assets" / "tiny_wan"
sys.path.insert(0, str(ROOT / "scripts"))

import check_tiny_wan as check
from tiny_wan import reader, text, vae_model, world
from tiny_wan.dit_training import build_transformer
from tiny_wan.loop import Stage, load_averages, train
from tiny_wan.optim import orthogonalise

CAPTION = "a red circle moving right on a blue background"


def test_held_out_scenes_use_every_word_evenly_and_are_never_trained():
    held_out, trained = world.held_out_scenes(), world.train_scenes()
    assert len(held_out) == 48 and len(trained) == 192 and not set(held_out) & set(trained)
    for name, values in zip(world.ATTRIBUTES, (world.SHAPES, world.COLOURS, world.BACKGROUNDS, world.DIRECTIONS)):
        counts = Counter(getattr(scene, name) for scene in held_out)
        assert set(counts) == set(values) and max(counts.values()) - min(counts.values()) <= 2
    assert CAPTION in {scene.caption for scene in world.all_scenes()}


def test_object_stays_in_the_frame():
    generator = torch.Generator().manual_seed(1)
    clips = world.render(world.all_scenes(), generator)
    edge = torch.cat([clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]], dim=-1)
    assert (edge.amax((2, 3)) - edge.amin((2, 3))).max() < 1e-6


def test_reader_reads_ground_truth():
    clips, scenes = check.ground_truth(seed=2)
    result = check.score(check.to_frames(clips), scenes)
    assert [result[name] for name in (*world.ATTRIBUTES, "all four")] == [24] * 5


def test_reader_does_not_guess():
    clips, scenes = check.ground_truth(seed=3)
    frames = check.to_frames(clips)
    flat = np.full_like(frames[0], 0.5)
    assert reader.read(flat) == {"shape": "?", "colour": "?", "background": "gray", "direction": "?"}
    still = np.repeat(frames[0][:1], world.NUM_FRAMES, axis=0)
    assert reader.read(still)["direction"] == reader.UNREAD
    noise = np.random.default_rng(3).random(flat.shape)
    assert reader.read(noise)["shape"] == reader.UNREAD
    backwards = [clip[::-1] for clip in frames]
    assert check.score(backwards, scenes)["direction"] == 0


@torch.no_grad()
def test_whole_clip_vae_equals_chunked():
    torch.manual_seed(4)
    vae = vae_model.use_single_frame_fast_conv(vae_model.build_vae()).eval()
    for num_frames in (1, 9):
        clips = torch.randn(1, 3, num_frames, 32, 32)
        latents = vae.encode(clips).latent_dist.mode()
        torch.testing.assert_close(vae_model.encode(vae, clips), latents, rtol=1e-4, atol=1e-5)
        decoded = vae_model.decode(vae, latents).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(latents).sample, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_short_padding_equals_512_rows():
    torch.manual_seed(5)
    tokenizer, transformer = text.build_tokenizer(), build_transformer().eval()
    torch.nn.init.normal_(transformer.proj_out.weight)
    ids, mask = text.tokenize(tokenizer, [CAPTION, ""])
    embeddings = text.encode_tokens(text.build_text_encoder(len(tokenizer)).eval(), ids, mask)
    latents, timestep = torch.randn(2, 16, 2, 4, 4), torch.tensor([900.0, 300.0])
    rest = embeddings.new_zeros(2, text.PIPELINE_LENGTH - text.TRAIN_LENGTH, text.TEXT_DIM)
    full = transformer(latents, timestep, torch.cat([embeddings, rest], dim=1)).sample
    text.use_padded_text(transformer).bias = text.padding_bias(mask)
    torch.testing.assert_close(transformer(latents, timestep, embeddings).sample, full, rtol=1e-4, atol=1e-4)


def test_every_caption_word_is_one_token():
    tokenizer = text.build_tokenizer()
    for scene in world.all_scenes():
        assert len(tokenizer(scene.caption).input_ids) == len(scene.caption.split()) + 1
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_orthogonalise_evens_out_singular_values(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(6))))
    assert 0.3 < values.min() and values.max() < 1.3


def test_training_resumes_where_it_stopped(tmp_path):
    target = torch.randn(6, 6, generator=torch.Generator().manual_seed(7))

    def stage(minutes: float) -> Stage:
        layer = torch.nn.Linear(6, 6)

        def step(_: float, generator: torch.Generator) -> torch.Tensor:
            x = torch.randn(8, 6, generator=generator)
            return (layer(x) - x @ target).square().mean()

        return Stage("line", [layer], step, minutes, lr=0.02)

    first, second = stage(0.005), stage(0.02)
    train(first, tmp_path, seed=7)
    train(second, tmp_path, seed=7)
    assert second.losses[: len(first.losses)] == first.losses
    assert len(second.losses) > len(first.losses) and second.losses[-1][1] < 0.2 * first.losses[0][1]
    (average,) = load_averages(tmp_path / "line.pt", [torch.nn.Linear(6, 6)])
    assert (average.weight.T - target).abs().max() < (torch.nn.Linear(6, 6).weight.T - target).abs().max()


def test_asset_is_small_and_stands_alone():
    files = [path for path in ASSET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {"README.md", "model_index.json"} <= {path.name for path in files}


@torch.no_grad()
def test_asset_loads_and_follows_a_held_out_prompt():
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(ASSET, torch_dtype=torch.float32)
    config = pipeline.transformer.config
    assert (config.num_attention_heads, config.attention_head_dim, config.in_channels) == (4, 48, 16)
    assert config.num_layers >= 4 and tuple(config.patch_size) == (1, 2, 2) and config.out_channels == 16
    assert pipeline.vae.config.z_dim == 16 and min(pipeline.vae.config.latents_std) > 0
    assert (pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal) == (8, 4)
    assert pipeline.tokenizer(CAPTION).input_ids == text.build_tokenizer()(CAPTION).input_ids

    scenes = world.held_out_scenes()[::8]
    with check.ENGINES["diffusers"](ASSET) as generate:
        clips = generate([scene.caption for scene in scenes], 0, 4.0, 12)
    assert clips[0].shape == (world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
    assert check.score(clips, scenes)["average"] >= 0.75


def test_preview_shows_the_colours_of_the_video():
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(ASSET / "vae", torch_dtype=torch.float32)
    table = json.loads((ASSET / "vae" / "latent_rgb.json").read_text())
    clips, _ = check.ground_truth(seed=3)
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = (vae.encode(clips[:6]).latent_dist.mode() - mean) / std
    preview = latents.movedim(1, -1) @ torch.tensor(table["factors"]) + torch.tensor(table["bias"])
    pooled = torch.nn.functional.adaptive_avg_pool3d(clips[:6], latents.shape[2:]).movedim(1, -1)
    assert (preview - pooled).square().mean() < 0.5 * pooled.var()  # the rest is what no linear map tells
