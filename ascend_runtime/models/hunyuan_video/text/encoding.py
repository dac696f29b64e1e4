"""Tokenises and encodes HunyuanVideo's prompts with a Llama and CLIP, and images with LLaVA's vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....checkpoints.tokenizers import JSON, bpe_json, check_class, clip_json
from ....checkpoints.tokenizers.bpe import CLIP_END, CLIP_START, MERGES, VOCABULARY
from ....errors import coded_error
from ...family import TEXT_ENCODER, TEXT_ENCODER_2
from ...hubs import HUBS
from ...shared.text import (
    POOLED,
    SHOWN_TOKENS,
    TEXT,
    Encoder,
    Encoders,
    GivenTokens,
    OnBlock,
    Picture,
    TextEncoding,
    run_with_blocks,
    without_embeddings,
)
from ...shared.tokenizers import JsonTokenizer, Tokenizer
from .images import pixels_of
from .networks import LlamaText, LlavaVision
from .templates import IMAGE_AT, IMAGE_TO_VIDEO, MAX_PROMPT_TOKENS, TEXT_TO_VIDEO, Template

CLIP_TOKENS = 77  # the length that CLIP was trained on; the rest of a prompt does not reach its vector
TOKENIZERS = f"hunyuanvideo-community/HunyuanVideo {HUBS}"
TOKENIZER_FOLDERS = {TEXT_ENCODER: "tokenizer", TEXT_ENCODER_2: "tokenizer_2"}
CORE_TOKENIZERS = {TEXT_ENCODER: "comfy/text_encoders/llama_tokenizer", TEXT_ENCODER_2: "comfy/sd1_tokenizer"}
TOKENIZER_SOURCES = {
    part: f"Use the folder {folder} of {TOKENIZERS}, or ComfyUI's {CORE_TOKENIZERS[part]}."
    for part, folder in TOKENIZER_FOLDERS.items()
}
TOKENIZER_OPTIONS = {TEXT_ENCODER: "tokenizer_path", TEXT_ENCODER_2: "tokenizer_path_2"}


@dataclass(frozen=True)
class HunyuanText(TextEncoding):
    """picture: the image that prompts are about; None: none."""

    picture: Picture | None = None

    def clean(self, text: str) -> str:
        """Removes whitespace at both ends, as the original does. Without this, the template's last new lines could
        become one token with the prompt's first."""
        return text.strip()

    def tokenizer(self, part: str, found: Path | None, shard: Path) -> Tokenizer:
        made = _loaded(part, found, shard)
        (_check_llama if part == TEXT_ENCODER else _check_clip)(made, found)
        return made

    def check_folder(self, part: str, folder: Path) -> None:
        check_class(folder, None, TOKENIZER_SOURCES[part])

    def advice(self, part: str) -> str:
        return TOKENIZER_SOURCES[part]

    def embeddings_in(self, part: str, model: nn.Module) -> int:
        return model.sizes.vocabulary

    def units(self, part: str, model: nn.Module) -> list[nn.Module]:
        if isinstance(model, LlamaText):
            return [model.embed_tokens, *model.layers]
        projector = [model.multi_modal_projector] if isinstance(model, LlavaVision) else []
        return [model.embeddings, *model.encoder.layers, *projector]

    def about(self, picture: Picture) -> HunyuanText:
        return HunyuanText(picture)

    @property
    def template(self) -> Template:
        return TEXT_TO_VIDEO if self.picture is None else IMAGE_TO_VIDEO

    def encode(self, encoders: Encoders, text: str, on_block: OnBlock) -> dict[str, Tensor]:
        """TEXT [1, tokens, D] of the Llama, with the image's tokens first, and POOLED [1, D] of CLIP."""
        llama, clip = encoders[TEXT_ENCODER], encoders[TEXT_ENCODER_2]
        vision = () if self.picture is None else self.picture.model.encoder.layers
        blocks = [*vision, *llama.model.layers, *clip.model.encoder.layers]
        made = run_with_blocks(blocks, on_block, lambda: (self._hidden(llama, text), _pooled(clip, text)))
        return dict(zip((TEXT, POOLED), made))

    def encode_tokens(self, part: str, encoder: Encoder, given: GivenTokens, on_block: OnBlock) -> dict[str, Tensor]:
        """Of the Llama TEXT [1, tokens, D], whose tokens do not attend to padding; images are embeddings. Of CLIP TEXT
        too, normed, and POOLED [1, D], that of the first end token."""
        model, ids = encoder.model, given.ids[None]
        if part == TEXT_ENCODER:
            device, width = model.embed_tokens.weight.device, model.sizes.width
            images = {at: _image(one, width).to(device) for at, one in given.embeddings.items()}
            padding = ids.shape[1] - given.length
            made = run_with_blocks(list(model.layers), on_block, lambda: model(ids.to(device), images, padding).cpu())
            return {TEXT: made}
        ids, most = without_embeddings(given), model.sizes.positions
        if ids.shape[1] > most:
            raise ValueError(f"CLIP reads at most {most} tokens at once, and there are {ids.shape[1]}.")
        ids = ids.to(model.final_layer_norm.weight.device)
        hidden = run_with_blocks(list(model.encoder.layers), on_block, lambda: model(ids).cpu())
        return {TEXT: hidden, POOLED: hidden[:, given.length - 1]}

    def embeddings(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Not padded: the transformer attends to the prompt's tokens only."""
        return {name: tensor.float() for name, tensor in encoded.items()}

    def cut(self, encoders: Encoders, text: str) -> list[str]:
        """CLIP's own cut, after 77 tokens, is not reported: its vector only summarises the prompt."""
        tokenizer, template = encoders[TEXT_ENCODER].tokenizer, self.template
        ids = _ids(tokenizer, template.around(text))[0].tolist()
        if len(ids) <= template.longest:
            return []
        most = MAX_PROMPT_TOKENS - template.dropped
        end = template.crop + most
        shown = tokenizer.decode(ids[end - SHOWN_TOKENS : end])
        return [
            f"The prompt has {len(ids) - template.crop - template.tail} tokens, but HunyuanVideo reads {most}: the "
            f"text after '... {shown.strip()}' is cut off. Shorten the prompt."
        ]

    def _hidden(self, llama: Encoder, text: str) -> Tensor:
        """[1, tokens, D]: of the image, if there is one, and of the prompt."""
        model, template, picture = llama.model, self.template, self.picture
        whole = _ids(llama.tokenizer, template.around(text))
        ids = whole[:, : template.longest].to(model.embed_tokens.weight.device)
        parts = template.kept(ids.shape[1], whole.shape[1] > template.longest)
        if picture is None:
            return _joined(model(ids).cpu(), parts)
        seen = _seen(picture)
        image = slice(IMAGE_AT, IMAGE_AT + seen.shape[1], picture.interleave)
        further = seen.shape[1] - 1  # the image's tokens are in the place of one
        prompt = [slice(part.start + further, part.stop + further) for part in parts]
        return _joined(model(ids, {IMAGE_AT: seen}).cpu(), [image, *prompt])


def _loaded(part: str, found: Path | None, shard: Path) -> Tokenizer:
    """The tokenizer in a folder. Raises ValueError, which says where to get it, if there is none."""
    if found is None or not found.is_dir():
        where = "contains no tokenizer, and there is none next to it" if found in (None, shard) else f"needs {found}"
        raise coded_error(
            "AV-1409",
            f"{shard} {where}. Put the folder {TOKENIZER_FOLDERS[part]} of {TOKENIZERS} next to it, or give "
            f"{TOKENIZER_OPTIONS[part]}, such as ComfyUI's {CORE_TOKENIZERS[part]}.",
        )
    check_class(found, None, TOKENIZER_SOURCES[part])
    if (found / JSON).is_file():
        return JsonTokenizer(bpe_json(found / JSON), found)
    if part == TEXT_ENCODER_2 and (found / VOCABULARY).is_file() and (found / MERGES).is_file():
        return JsonTokenizer(clip_json(found), found)
    needs = JSON if part == TEXT_ENCODER else f"neither {JSON} nor {VOCABULARY} with {MERGES}"
    raise coded_error(
        "AV-1409", f"{found} has {'no ' if part == TEXT_ENCODER else ''}{needs}. {TOKENIZER_SOURCES[part]}"
    )


def _check_llama(tokenizer: Tokenizer, found: Path) -> None:
    for template in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO):
        count, wanted = _ids(tokenizer, template.around("")).shape[1], template.crop + template.tail
        if count != wanted:
            raise coded_error(
                "AV-1410",
                f"{found} is the tokenizer of another model: HunyuanVideo's template has {count} tokens in it, not "
                f"{wanted}. {TOKENIZER_SOURCES[TEXT_ENCODER]}",
            )


def _check_clip(tokenizer: Tokenizer, found: Path) -> None:
    first, *inner, last = _ids(tokenizer, f"{CLIP_START}{CLIP_END}")[0].tolist()
    if inner != [first, last]:
        raise coded_error(
            "AV-1410",
            f"{found} is the tokenizer of another model: it does not put {CLIP_START} before a text and {CLIP_END} "
            f"after it. {TOKENIZER_SOURCES[TEXT_ENCODER_2]}",
        )


def _ids(tokenizer: Tokenizer, text: str) -> Tensor:
    """All of a text's tokens [1, n]."""
    return tokenizer(text, truncation=False).input_ids


def _joined(hidden: Tensor, parts: list[slice]) -> Tensor:
    return torch.cat([hidden[:, part] for part in parts], 1)


def _image(embeddings: Tensor, width: int) -> Tensor:
    """Embeddings [n, D] as the tokens [1, n, D] of an image for a Llama of this width."""
    if embeddings.ndim != 2 or embeddings.shape[1] != width:
        raise ValueError(
            f"The tokens of an image have the shape {list(embeddings.shape)}; this text encoder reads [n, {width}]. "
            "Use the vision model that belongs to it, such as llava_llama3_vision.safetensors."
        )
    return embeddings[None]


def _seen(picture: Picture) -> Tensor:
    """The image's tokens [1, tokens, D]."""
    weights = picture.model.embeddings.patch_embedding.weight
    return picture.model(pixels_of(picture.image, picture.model.sizes.side).to(weights.device, weights.dtype))


def _pooled(clip: Encoder, text: str) -> Tensor:
    """[1, D]"""
    most = min(CLIP_TOKENS, clip.model.sizes.positions)
    ids = clip.tokenizer(text, truncation=True, max_length=most).input_ids
    first = ids[0].tolist().index(int(ids[0, -1]))  # a prompt may have end tokens itself
    return clip.model(ids.to(clip.model.final_layer_norm.weight.device))[:, first].cpu()
