"""HunyuanVideo's text encoders on this process's CPU, and what diffusers' pipelines make of the same files."""

from __future__ import annotations

from pathlib import Path

import tiny_llava
import torch
from ascend_runtime import TextEncoderSpec
from ascend_runtime.components import Components
from ascend_runtime.models.shared.text import Picture
from diffusers import HunyuanVideoImageToVideoPipeline, HunyuanVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaForCausalLM,
    LlamaModel,
    LlavaForConditionalGeneration,
)

PROMPT = "A red ball rolls, over the video's camera."
TENSORS = "model.safetensors"


def load(path, path_2=None, **fields):
    """The text encoders of a spec."""
    spec = TextEncoderSpec(path=str(path), path_2=path_2 and str(path_2), **fields)
    return Components(torch.device("cpu")).get(spec, lambda *_: None)


def vision(path, **fields):
    """The vision tower of a spec."""
    spec = TextEncoderSpec(path=str(path), **fields)
    return Components(torch.device("cpu")).get(spec.vision, lambda *_: None).model


@torch.no_grad()
def encoded(loaded, prompt=PROMPT, picture=None, on_block=lambda *_: None):
    """The text's embedding and the pooled vector."""
    encoding = loaded.encoding if picture is None else loaded.encoding.about(picture)
    made = encoding.embeddings(encoding.encode(loaded.encoders, encoding.clean(prompt), on_block))
    return made["text"], made["pooled"]


def image(width=150, height=100, seed=3):
    """[H, W, 3] in 0..1, whose values are whole 255ths."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (height // 10 + 1, width // 10 + 1, 3), generator=generator)
    return levels.repeat_interleave(10, 0).repeat_interleave(10, 1)[:height, :width].float() / 255


def as_pil(image):
    return Image.fromarray((image * 255).round().to(torch.uint8).numpy())


def picture(model, image, interleave=2):
    return Picture(model, image, interleave)


class Diffusers:
    """diffusers' pipeline of a folder that `tiny_llava.save` wrote, without what encodes no prompt."""

    def __init__(self, folder: Path, images: bool = False):
        kind = HunyuanVideoImageToVideoPipeline if images else HunyuanVideoPipeline
        encoder = LlavaForConditionalGeneration if images else LlamaModel
        further = {"image_processor": CLIPImageProcessor.from_pretrained(folder / "image_processor")} if images else {}
        self.pipeline = kind(
            text_encoder=encoder.from_pretrained(folder / "text_encoder").eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder_2=CLIPTextModel.from_pretrained(folder / "text_encoder_2").eval(),
            tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            transformer=None, vae=None, scheduler=None, **further,
        )  # fmt: skip

    @torch.no_grad()
    def encoded(self, prompt=PROMPT, **options):
        """As `encoded`, without the padding."""
        text, pooled, mask = self.pipeline.encode_prompt(prompt=prompt, device=torch.device("cpu"), **options)
        kept = int(mask.sum())
        assert mask[0, :kept].all()
        return text[:, :kept], pooled


def save_original(root: Path, folder: Path, images: bool = False) -> Path:
    """The original's folders: a Llama with its head, or a LLaVA, and a CLIP with its vision model, each with its
    tokenizer in it. folder: as `tiny_llava.save` wrote it."""
    name = "text_encoder_i2v" if images else "text_encoder"
    if images:
        LlavaForConditionalGeneration.from_pretrained(folder / "text_encoder").save_pretrained(root / name)
    else:
        base = LlamaModel.from_pretrained(folder / "text_encoder")
        whole = LlamaForCausalLM(base.config)
        whole.model.load_state_dict(base.state_dict())
        whole.save_pretrained(root / name)
    text = CLIPTextModel.from_pretrained(folder / "text_encoder_2")
    vision_config = tiny_llava.llava().config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text.config.to_dict(), vision_config=vision_config, projection_dim=8))
    clip.text_model.load_state_dict(text.state_dict())
    clip.save_pretrained(root / "text_encoder_2")
    tiny_llava.save_llama_tokenizer(root / name)
    tiny_llava.save_clip_tokenizer(root / "text_encoder_2")
    return root


def llama_tensors(folder: Path, prefix="model."):
    """The Llama's tensors with a prefix and a head, as in one file."""
    held = load_file(folder / "text_encoder" / TENSORS)
    return {prefix + name: tensor for name, tensor in held.items()} | {"lm_head.weight": torch.randn(5, 3)}


def clip_tensors(folder: Path, prefix="text_model."):
    """CLIP's tensors as core ComfyUI's file has them."""
    held = load_file(folder / "text_encoder_2" / TENSORS)
    return {prefix + name: tensor for name, tensor in held.items()} | {
        "text_projection.weight": torch.randn(4, 4), f"{prefix}embeddings.position_ids": torch.arange(77)[None]
    }  # fmt: skip


def vision_tensors(folder: Path):
    """The vision tower's tensors as core ComfyUI's file has them."""
    held = load_file(folder / "text_encoder" / TENSORS)
    vision = {name: x for name, x in held.items() if name.startswith(("vision_tower.", "multi_modal_projector."))}
    return {name.replace("vision_tower.", "vision_model."): x for name, x in vision.items()}


def save_files(root: Path, folder: Path) -> tuple[Path, Path]:
    """The Llama and CLIP in one file each, as Comfy-Org publishes them."""
    llama, clip = root / "llava_llama3_fp16.safetensors", root / "clip_l.safetensors"
    save_file(llama_tensors(folder), llama)
    save_file(clip_tensors(folder), clip)
    return llama, clip
