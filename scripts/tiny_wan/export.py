"""Writes the trained parts as a diffusers folder that `WanPipeline.from_pretrained` loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from . import world
from .dit_training import FLOW_SHIFT
from .text import build_tokenizer

DEFAULTS = {  # ascend_defaults.json: the default settings, with which the model was evaluated
    "width": world.SIZE,
    "height": world.SIZE,
    "num_frames": world.NUM_FRAMES,
    "fps": world.FPS,
    "steps": 20,
    "shift": FLOW_SHIFT,
    "guidance_scale": 4.0,
}


def export(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    mean: torch.Tensor,
    std: torch.Tensor,
) -> None:
    """Saves everything in bf16 next to `folder`, then moves it there file by file, so that no reader sees half a file.

    mean, std: of the latent's channels, `[16]`; they go to the VAE's configuration.
    """
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, solver_order=2
    )
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(), text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=transformer
    )
    fresh = folder.with_name(folder.name + ".new")
    pipeline.to(torch.bfloat16).save_pretrained(fresh)
    _name_fast_tokenizer(fresh)
    (fresh / "ascend_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    for source in sorted(path for path in fresh.rglob("*") if path.is_file()):
        target = folder / source.relative_to(fresh)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    shutil.rmtree(fresh)


def _name_fast_tokenizer(folder: Path) -> None:
    """Also for transformers 4, which for `T5Tokenizer`, version 5's name of the fast one, expects a sentencepiece file,
    and does not read a list of special tokens."""
    for path, edit in (
        (folder / "model_index.json", lambda index: index | {"tokenizer": ["transformers", "T5TokenizerFast"]}),
        (
            folder / "tokenizer" / "tokenizer_config.json",
            lambda config: {name: value for name, value in config.items() if name != "extra_special_tokens"}
            | {"tokenizer_class": "T5TokenizerFast"},
        ),
    ):
        path.write_text(json.dumps(edit(json.loads(path.read_text())), indent=2) + "\n")
