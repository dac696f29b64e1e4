"""A text encoder as the original and ComfyUI keep it: told by content, equal to transformers', its tokenizer found."""

import re
import shutil

import original_formats as formats
import pytest
import sentencepiece
import tiny_models
import torch
from ascend_runtime import TextEncoderSpec
from ascend_runtime.recognition.layout import find_part
from ascend_runtime.components import Components
from ascend_runtime.models.shared.text import Encoder
from ascend_runtime.models.wan.text import WanText
from safetensors.torch import save_file
from transformers import T5TokenizerFast

PROMPT = "a red circle  moving right, on a blue background"


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    file = tmp_path_factory.mktemp("spiece") / "spiece.model"
    file.write_bytes(formats.sentencepiece_model())
    return file


@pytest.fixture(scope="module")
def theirs():
    return tiny_models.umt5(seed=9, layers=3, vocabulary=64)


def transformers_own(spiece):
    return T5TokenizerFast.from_pretrained(spiece.parent, extra_ids=0)


def load(path):
    return Components(torch.device("cpu")).get(TextEncoderSpec(path=str(path)), lambda *_: None)


def in_folder(tmp_path, tensors, spiece):
    """The original's: a .pth, and google/umt5-xxl beside it."""
    torch.save(tensors, tmp_path / "any name.pth")
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    transformers_own(spiece).save_pretrained(tmp_path / "google" / "umt5-xxl")
    return tmp_path / "any name.pth"


def fp8_scaled(file, tensors):
    kept, scales = formats.in_8_bits(tensors)
    formats.save_old_mark(file, kept, scales)
    return formats.dequantized(kept, scales)


class TransformersOwn:
    """Called as ours are."""

    def __init__(self, spiece):
        self._tokenizer = transformers_own(spiece)
        self.decode = self._tokenizer.decode

    def __call__(self, text, **options):
        return self._tokenizer(text, return_tensors="pt", **options)


def cut(tokenizer, text):
    return WanText().cut({"text_encoder": Encoder(None, tokenizer)}, text)


def tokenizer_of(path):
    return load(path).encoders["text_encoder"].tokenizer


@torch.no_grad()
def assert_same(path, theirs, spiece, what):
    encoder = load(path)
    tokens = [*sentencepiece.SentencePieceProcessor(str(spiece)).encode(PROMPT), 1]
    expected = theirs(torch.tensor([tokens])).last_hidden_state
    made = encoder.encoding.embeddings(encoder.encoding.encode(encoder.encoders, PROMPT, lambda *_: None))["text"]
    print(f"\n{what:40} largest difference {(made[:, : len(tokens)] - expected).abs().max():.1e}")
    assert expected.std() > 0.1
    torch.testing.assert_close(made[:, : len(tokens)], expected, atol=1e-4, rtol=0)
    assert not made[:, len(tokens) :].any()


def test_the_originals_pth_equals_transformers(tmp_path, theirs, spiece):
    file = in_folder(tmp_path, formats.original_umt5(theirs), spiece)
    assert_same(file, theirs, spiece, "the original's .pth")
    before = find_part(str(file), "text_encoder").fingerprint
    tokenizer = tmp_path / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert find_part(str(file), "text_encoder").fingerprint != before
    torch.save({"encoder.conv1.weight": torch.zeros(2)}, tmp_path / "a vae.pth")
    assert_same(tmp_path, theirs, spiece, "its folder")


def test_comfyuis_file_equals_transformers(tmp_path, theirs, spiece):
    save_file(formats.comfyui_umt5(theirs, spiece.read_bytes()), tmp_path / "a")
    assert_same(tmp_path / "a", theirs, spiece, "ComfyUI's .safetensors")


def test_comfyuis_fp16_and_fp8_files_equal_their_twins(tmp_path, theirs, spiece):
    half = formats.comfyui_umt5(theirs, spiece.read_bytes(), torch.float16)
    save_file(half, tmp_path / "fp16")
    twins = {"fp16": half, "fp8": fp8_scaled(tmp_path / "fp8", formats.comfyui_umt5(theirs, spiece.read_bytes()))}
    for name, twin in twins.items():
        network = tiny_models.umt5(layers=3, vocabulary=64)
        state = {other: x.float() for other, x in twin.items() if other != "spiece_model"}
        network.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
        assert_same(tmp_path / name, network, spiece, f"ComfyUI's {name}")


def test_a_long_prompt_is_cut_as_transformers_does(tmp_path, theirs, spiece):
    save_file(formats.comfyui_umt5(theirs, spiece.read_bytes()), tmp_path / "a")
    tokens = tokenizer_of(tmp_path / "a")("red " * 600, truncation=True, max_length=512)
    expected = transformers_own(spiece)("red " * 600, truncation=True, max_length=512).input_ids
    assert tokens.input_ids.tolist() == [expected] and len(expected) == 512 and expected[-1] == 1


def test_a_prompt_that_is_cut_says_how_long_it_is_and_where(tmp_path, theirs, spiece):
    """By the tokenizer of a file and by transformers' alike; not where it just fits."""
    save_file(formats.comfyui_umt5(theirs, spiece.read_bytes()), tmp_path / "a")
    pairs = [f"{color} {shape}" for color in ("red", "green") for shape in ("circle", "square")]
    words = " ".join(pairs * 200)
    for tokenizer in (tokenizer_of(tmp_path / "a"), TransformersOwn(spiece)):
        ids = tokenizer(words, truncation=False).input_ids[0].tolist()
        (said,) = cut(tokenizer, words)
        end = re.search(r"after '\.\.\. (.*)' is cut off", said)[1]
        assert f"The prompt has {len(ids)} tokens, but Wan reads 512" in said
        assert tokenizer.decode(ids[:511]).endswith(end) and len(end) > 10
        fits = tokenizer.decode(ids[:511])
        assert cut(tokenizer, fits) == [] and len(cut(tokenizer, f"{fits} red")) == 1


def test_a_file_without_a_tokenizer_says_where_to_get_one(tmp_path, theirs, spiece):
    file = in_folder(tmp_path, formats.original_umt5(theirs), spiece)
    shutil.rmtree(tmp_path / "google")
    with pytest.raises(ValueError, match="contains no tokenizer, .*google/umt5-xxl of Wan-AI/.*ModelScope"):
        load(file)


def test_the_originals_folder_without_it_says_where_to_get_it(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "model_type": "t2v"}')
    with pytest.raises(ValueError, match="holds no UMT5 text encoder. Download models_t5_umt5-xxl-enc-bf16.pth"):
        load(tmp_path)


def test_a_pth_that_cannot_be_read_is_named_where_the_encoder_is_missed(tmp_path, theirs, spiece):
    (tmp_path / "a clip.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="holds no UMT5 text encoder.*a clip.pth is not a complete torch.save file"):
        load(tmp_path)
    in_folder(tmp_path, formats.original_umt5(theirs), spiece)
    assert_same(tmp_path, theirs, spiece, "beside a damaged file")


def test_the_fingerprint_changes_with_the_file(tmp_path, theirs, spiece):
    file = in_folder(tmp_path, formats.original_umt5(theirs), spiece)
    before = find_part(str(tmp_path), "text_encoder").fingerprint
    torch.save(formats.original_umt5(theirs), file)
    assert find_part(str(tmp_path), "text_encoder").fingerprint != before


NAME, OURS = "blocks.1.attn.q.weight", "encoder.block.1.layer.0.SelfAttention.q.weight"
DAMAGE = {
    f"missing: {OURS}": lambda t: {name: x for name, x in t.items() if name != NAME},
    "missing: shared.weight": lambda t: {name: x for name, x in t.items() if name != "token_embedding.weight"},
    "unexpected: stranger": lambda t: t | {"stranger": torch.zeros(1)},
    f"of the wrong shape: {OURS}": lambda t: t | {NAME: torch.zeros(2, 3)},
    f"NaN or infinite values in {OURS}": lambda t: t | {NAME: torch.full_like(t[NAME], float("nan"))},
    "is not a UMT5 text encoder": lambda t: {"patch_embedding.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("says", DAMAGE)
def test_damage_is_named(tmp_path, theirs, spiece, says):
    file = in_folder(tmp_path, DAMAGE[says](formats.original_umt5(theirs)), spiece)
    with pytest.raises(ValueError, match=says):
        load(file)
