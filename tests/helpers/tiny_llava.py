"""Small text encoders and a vision tower of HunyuanVideo with random weights, and tokenizers that fit its templates.

Both tokenizers know all bytes. Of words, Llama's knows those of the templates, each as one token, as the published
one does: so the templates have as many tokens as with that one.
"""

import json
import re
from pathlib import Path

import tiny_models
import torch
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as text_to_video
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as image_to_video
from random_hunyuan import POOLED_DIM, TEXT_DIM
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

LLAMA_HEAD_DIM = 128  # which no file shows
IMAGE_SIDE, IMAGE_PATCH = 336, 14  # of the published vision tower: 24 x 24 = 576 tokens
TEMPLATES = tuple(module.DEFAULT_PROMPT_TEMPLATE["template"] for module in (text_to_video, image_to_video))
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                 "<image>", "<pad>")  # fmt: skip
LLAMA_WORDS = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                    r"\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CLIP_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
ALPHABET = sorted(ByteLevel.alphabet())


def llama_tokenizer() -> Tokenizer:
    words = PreTokenizers([Split(LLAMA_WORDS, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [text for template in TEMPLATES for text in re.split(r"<[^>]*>|\{\}", template)]
    known = sorted({word for text in texts for word, _ in words.pre_tokenize_str(text)} - set(ALPHABET))
    made = Tokenizer(BPE({word: number for number, word in enumerate([*ALPHABET, *known])}, [], ignore_merges=True))
    made.pre_tokenizer, made.decoder = words, ByteLevelDecoder()
    made.add_special_tokens(list(LLAMA_SPECIAL))
    first = LLAMA_SPECIAL[0]
    made.post_processor = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, made.token_to_id(first))]
    )
    return made


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The pieces and their numbers, and the merges; the end token has the largest number, as in the published one."""
    merges = [("a", "n"), ("e", "d</w>"), ("r", "ed</w>"), ("l", "l</w>"), ("i", "n")]
    pieces = [*ALPHABET, *(f"{byte}</w>" for byte in ALPHABET), *map("".join, merges), *CLIP_SPECIAL]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def clip_tokenizer() -> Tokenizer:
    """As openai's tokenizer.json."""
    vocabulary, merges = clip_vocabulary()
    made = Tokenizer(
        BPE(vocabulary, merges, unk_token=CLIP_SPECIAL[1], continuing_subword_prefix="", end_of_word_suffix="</w>")
    )
    made.normalizer = Normalizers([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    made.pre_tokenizer = PreTokenizers([Split(CLIP_WORDS, "removed", invert=True), ByteLevel(add_prefix_space=False)])
    made.decoder = ByteLevelDecoder()
    made.add_special_tokens(list(CLIP_SPECIAL))
    first, last = ((token, vocabulary[token]) for token in CLIP_SPECIAL)
    made.post_processor = RobertaProcessing(last, first, trim_offsets=False, add_prefix_space=False)
    return made


def save_llama_tokenizer(folder: Path) -> Path:
    """As the folder `tokenizer` of diffusers' form, which its pipelines read too."""
    folder.mkdir(parents=True, exist_ok=True)
    llama_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": LLAMA_SPECIAL[0], "pad_token": "<pad>",
                "model_max_length": 4096, "padding_side": "right"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def save_clip_tokenizer(folder: Path, json_file: bool = True) -> Path:
    """As the folder `tokenizer_2` of diffusers' form. json_file: tokenizer.json, else only vocab.json and merges.txt,
    as core ComfyUI's folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    if json_file:
        clip_tokenizer().save(str(folder / "tokenizer.json"))
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    marks = dict(zip(("bos_token", "eos_token"), CLIP_SPECIAL)) | dict.fromkeys(
        ("pad_token", "unk_token"), CLIP_SPECIAL[1]
    )
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    return folder


def llama_config(**changes) -> LlamaConfig:
    sizes = {"vocab_size": llama_tokenizer().get_vocab_size(), "hidden_size": TEXT_DIM, "intermediate_size": 40,
             "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": LLAMA_HEAD_DIM,
             "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
             "pad_token_id": llama_tokenizer().token_to_id("<pad>")}  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def llama(seed: int = 0, **changes) -> LlamaModel:
    """transformers' Llama of five layers; two of them are not used. changes: of its config."""
    torch.manual_seed(seed)
    return tiny_models.randomise(LlamaModel(llama_config(**changes)), seed).eval()


def clip_text(seed: int = 0, **changes) -> CLIPTextModel:
    """transformers' CLIP of two layers. changes: of its config."""
    numbers, _ = clip_vocabulary()
    sizes = {"vocab_size": len(numbers), "hidden_size": POOLED_DIM, "intermediate_size": 20,
             "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_act": "quick_gelu",
             "bos_token_id": numbers[CLIP_SPECIAL[0]], "eos_token_id": numbers[CLIP_SPECIAL[1]]}  # fmt: skip
    torch.manual_seed(seed)
    return tiny_models.randomise(CLIPTextModel(CLIPTextConfig(**{**sizes, **changes})), seed).eval()


def llava(seed: int = 0, **changes) -> LlavaForConditionalGeneration:
    """transformers' LLaVA: this Llama, a vision tower of three layers (the last one is not used) that makes 576 tokens
    of an image, and their projector. changes: of the Llama's config."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=40, num_hidden_layers=3, num_attention_heads=1, image_size=IMAGE_SIDE,
        patch_size=IMAGE_PATCH,
    )  # fmt: skip
    text, tokenizer = llama_config(**changes), llama_tokenizer()
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.token_to_id("<image>"),
        pad_token_id=tokenizer.token_to_id("<pad>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    return tiny_models.randomise(LlavaForConditionalGeneration(config), seed).eval()


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size=IMAGE_SIDE)


def save(root: Path, images: bool = False, seed: int = 0) -> Path:
    """Adds both text encoders and their tokenizers to a diffusers folder. images: with a vision tower, as models for
    image to video have one."""
    encoder = llava(seed) if images else llama(seed)
    encoder.save_pretrained(root / "text_encoder")
    clip_text(seed).save_pretrained(root / "text_encoder_2")
    save_llama_tokenizer(root / "tokenizer")
    save_clip_tokenizer(root / "tokenizer_2")
    if images:
        image_processor().save_pretrained(root / "image_processor")
    index = root / "model_index.json"
    held = json.loads(index.read_text()) if index.is_file() else {"_class_name": "HunyuanVideoPipeline"}
    held |= {"text_encoder": ["transformers", type(encoder).__name__],
             "text_encoder_2": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
             "tokenizer_2": ["transformers", "CLIPTokenizer"]}  # fmt: skip
    held |= {"image_processor": ["transformers", "CLIPImageProcessor"]} if images else {}
    index.write_text(json.dumps(held))
    return root
