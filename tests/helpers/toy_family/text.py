"""The Toy's text encoders: one embeds words in their order, one makes a vector of all pieces of a prompt."""

from __future__ import annotations

import torch
from ascend_runtime.checkpoints.bounded import read_json
from ascend_runtime.checkpoints.tokenizers import JSON, tokenizer_json
from ascend_runtime.models.shared.text import POOLED, TEXT, TextEncoding, run_with_blocks
from ascend_runtime.models.shared.tokenizers import JsonTokenizer, Tokens
from torch import nn

from . import TEXT_ENCODER, TEXT_ENCODER_2

MAX_WORDS, MAX_PIECES = 12, 8
PIECES = "pieces.json"  # the size of the vocabulary


class Words(nn.Module):
    """[1, n] -> [1, n, width]: layers that see a word and those before it."""

    def __init__(self, config):
        super().__init__()
        with torch.device("meta"):
            self.words = nn.Embedding(config["vocab_size"], config["width"])
            self.layers = nn.ModuleList(
                nn.Linear(2 * config["width"], config["width"]) for _ in range(config["num_layers"])
            )

    def forward(self, ids):
        x = self.words(ids)
        before = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype).view(1, -1, 1)
        for layer in self.layers:
            x = x + torch.tanh(layer(torch.cat([x, x.cumsum(1) / before], 2)))
        return x


class Pooled(nn.Module):
    """[1, n] -> [1, pooled_dim]"""

    def __init__(self, config):
        super().__init__()
        with torch.device("meta"):
            self.pieces = nn.Embedding(config["vocab_size"], config["width"])
            self.projection = nn.Linear(config["width"], config["pooled_dim"])

    def forward(self, ids):
        return self.projection(torch.tanh(self.pieces(ids).sum(1)))


class Pieces:
    """A tokenizer without a library: two characters are a piece, its number that of both in the vocabulary."""

    def __init__(self, size):
        self.size = size

    def __call__(self, text, *, truncation, max_length=None):
        pairs = [text[at : at + 2] for at in range(0, len(text), 2)] or [""]
        ids = [sum(ord(one) * 31**place for place, one in enumerate(pair)) % self.size for pair in pairs]
        tokens = torch.tensor([ids[: max_length if truncation else None]])
        return Tokens(tokens, torch.ones_like(tokens))

    def decode(self, tokens):
        return " ".join(map(str, tokens))


class ToyText(TextEncoding):
    def clean(self, text):
        return text.strip().lower()

    def tokenizer(self, part, found, shard):
        name = JSON if part == TEXT_ENCODER else PIECES
        if found is None or not (found / name).is_file():
            raise ValueError(f"{shard} needs {name} of a Toy in the folder {found}.")
        if part == TEXT_ENCODER_2:
            return Pieces(read_json(found / name)["size"])
        return JsonTokenizer(tokenizer_json(found / name), found)

    def embeddings_in(self, part, model):
        return (model.words if part == TEXT_ENCODER else model.pieces).num_embeddings

    def units(self, part, model):
        return [model.words, *model.layers] if part == TEXT_ENCODER else [model.pieces, model.projection]

    def encode(self, encoders, text, on_block):
        words, pieces = encoders[TEXT_ENCODER], encoders[TEXT_ENCODER_2]

        def ids(encoder, most):
            weights = next(encoder.model.parameters())
            return encoder.tokenizer(text, truncation=True, max_length=most).input_ids.to(weights.device)

        hidden = run_with_blocks(list(words.model.layers), on_block, lambda: words.model(ids(words, MAX_WORDS)).cpu())
        return {TEXT: hidden, POOLED: pieces.model(ids(pieces, MAX_PIECES)).cpu()}

    def embeddings(self, encoded):
        """Not padded: a text is as long as its prompt."""
        return {name: tensor.float() for name, tensor in encoded.items()}

    def cut(self, encoders, text):
        words = encoders[TEXT_ENCODER].tokenizer(text, truncation=False).input_ids.shape[1]
        return [f"The prompt has {words} words, and a Toy reads {MAX_WORDS}."] if words > MAX_WORDS else []
