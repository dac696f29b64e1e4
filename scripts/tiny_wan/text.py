"""Text encoding: a T5 tokenizer with one token per caption word, a small UMT5 encoder, and its padding.

`WanPipeline` pads every prompt with zero rows to 512 and attends to all of them. All zero rows have the same key and
value, so training keeps only a few of them, with a bias of log(count) on their attention scores: the same result for a
fiftieth of the cost (tests/models/test_tiny_wan.py).
"""

from __future__ import annotations

import string

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from . import world

TEXT_DIM = 128
PIPELINE_LENGTH = 512  # of the padded prompt in Wan's pipelines
TRAIN_LENGTH = 12  # room for every caption, its end token and at least one row of padding


def build_tokenizer() -> T5TokenizerFast:
    """Every caption word is one token; other text is split into letters, or becomes <unk>."""
    words = sorted({word for scene in world.all_scenes() for word in scene.caption.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [("▁" + word, -1.0) for word in words]
    vocabulary += [(letter, -10.0) for letter in string.ascii_lowercase]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=PIPELINE_LENGTH)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=-(-vocab_size // 8) * 8,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def tokenize(tokenizer: T5TokenizerFast, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, each `[B,TRAIN_LENGTH]`."""
    tokens = tokenizer(prompts, padding="max_length", max_length=TRAIN_LENGTH, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def encode_tokens(encoder: UMT5EncoderModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Embeddings `[B,TRAIN_LENGTH,TEXT_DIM]`, zero where the mask is."""
    return encoder(ids, mask).last_hidden_state * mask.unsqueeze(-1)


def padding_bias(mask: torch.Tensor, length: int = PIPELINE_LENGTH) -> torch.Tensor:
    """Biases `[B,1,1,L]` for cross-attention scores that give the padding the weight of padding to `length`."""
    used = mask.sum(1, keepdim=True)
    share = (length - used) / (mask.shape[1] - used)
    return torch.where(mask.bool(), 0.0, share.log())[:, None, None, :]


class PaddedTextProcessor(WanAttnProcessor):
    """Cross-attention with `padding_bias`; set `bias` before each forward."""

    bias: torch.Tensor | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def use_padded_text(transformer: WanTransformer3DModel) -> PaddedTextProcessor:
    """Sets one shared processor for every cross-attention, and returns it."""
    processor = PaddedTextProcessor()
    for block in transformer.blocks:
        block.attn2.set_processor(processor)
    return processor
