"""Writes Toy models of random weights: folders as diffusers', and single files with fused layers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from . import CHANNELS, FAMILY, FUSED, HEAD_DIM, PARTS, TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE
from .text import PIECES

WORDS = ("</s>", "<unk>", "a", "red", "blue", "circle", "moving", "left", "right", "blurry")
CONFIGS = {
    TRANSFORMER: {"in_channels": CHANNELS, "out_channels": CHANNELS, "patch_size": [1, 2, 2], "num_layers": 2,
                  "num_attention_heads": 4, "attention_head_dim": HEAD_DIM, "num_single_layers": 3, "text_dim": 24,
                  "pooled_dim": 12},
    TEXT_ENCODER: {"vocab_size": len(WORDS), "width": 24, "num_layers": 2},
    TEXT_ENCODER_2: {"vocab_size": 50, "width": 20, "pooled_dim": 12},
    VAE: {"base_dim": 8, "z_dim": CHANNELS},
}  # fmt: skip
# The file form's names, by the own ones: what __init__.RENAMED undoes.
FILE_NAMES = (("patch_embedding.", "img_in."), ("condition_embedder.time.", "time_in."), (".text.", ".txt_"),
              ("condition_embedder.vector.", "vector_in."), ("condition_embedder.txt.", "txt_in."),
              (".video.", ".img_"), ("norm_out.linear.", "final.mod."), ("proj_out.", "final.linear."))  # fmt: skip


def random_weights(part, seed=0):
    """Seeded; matrices keep the variance of what goes in, biases are small, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in FAMILY.network(part, CONFIGS[part]).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if noise.ndim == 1 else 1 / math.sqrt(math.prod(noise.shape[1:]))
        weights[name] = scale * noise + ("norm" in name and name.endswith("weight") and noise.ndim == 1)
    return weights


def folder(root: Path, seed=0) -> Path:
    """A whole model, as diffusers lays it out."""
    for part, config in CONFIGS.items():
        (root / part).mkdir(parents=True)
        key, value = PARTS[part].class_name
        (root / part / "config.json").write_text(json.dumps({key: value, **config}))
        save_file(random_weights(part, seed), root / part / "diffusion_pytorch_model.safetensors")
    tokenizers(root / "tokenizer", root / "tokenizer_2")
    index = {part: ["toy", PARTS[part].class_name[1]] for part in CONFIGS}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **index}))
    return root


def tokenizers(words: Path, pieces: Path) -> None:
    words.mkdir()
    pieces.mkdir()
    made = Tokenizer(Unigram([(word, -float(place)) for place, word in enumerate(WORDS)], unk_id=1))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    made.save(str(words / "tokenizer.json"))
    (pieces / PIECES).write_text(json.dumps({"size": CONFIGS[TEXT_ENCODER_2]["vocab_size"]}))


def single_files(root: Path, seed=0) -> dict[str, Path]:
    """The transformer with fused layers and other names, the VAE, and both text encoders in one file."""
    root.mkdir(parents=True, exist_ok=True)
    tokenizers(root / "toy_words", root / "toy_pieces")
    text = {f"text_encoders.{part}.{name}": tensor for part in (TEXT_ENCODER, TEXT_ENCODER_2)
            for name, tensor in random_weights(part, seed).items()}  # fmt: skip
    held = {TRANSFORMER: fused(random_weights(TRANSFORMER, seed)), VAE: random_weights(VAE, seed), TEXT_ENCODER: text}
    files = {part: root / f"toy_{part}.safetensors" for part in held}
    for part, tensors in held.items():
        save_file(tensors, files[part])
    return files


def fused(weights):
    """The file form of a transformer's weights."""
    left, tensors = dict(weights), {}
    for name in weights:
        owner, _, kind = name.rpartition(".")
        owner, _, leaf = owner.rpartition(".")
        if leaf == "to_q":
            layer = "linear1" if owner.startswith("single") else "qkv"
            parts = [left.pop(f"{owner}.{part}.{kind}") for part in FUSED[layer]]
            tensors[f"{owner}.{layer}.{kind}"] = torch.cat(parts)
    tensors |= left
    for name in ("norm_out.linear.weight", "norm_out.linear.bias"):
        tensors[name] = torch.cat(tensors[name].chunk(2)[::-1])
    return {file_name(name): tensor.contiguous() for name, tensor in tensors.items()}


def file_name(name):
    for own, theirs in FILE_NAMES:
        name = name.replace(own, theirs)
    return name
