"""Text encoders in GGUF files, by llama.cpp's names: what they make of a prompt, and their tokenizers."""

import itertools

import gguf_files
import hunyuan_encoders
import original_formats
import pytest
import sentencepiece
import tiny_llava
import tiny_models
import torch
from ascend_runtime import TextEncoderSpec
from ascend_runtime.checkpoints.formats.gguf_tokenizer import sentencepiece_model
from ascend_runtime.components import Components
from gguf_files import as_llama_cpp, t5_fields, turned
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import UMT5Config, UMT5EncoderModel

TEXTS = "a red circle moving left", "  ＲＥＤ  ① square ", "ünknown 2²", ""


@pytest.fixture(scope="module")
def spiece():
    return original_formats.sentencepiece_model()


def in_turn(kinds):
    """The types of matrices in turn; tables of positions and vectors are whole."""
    turn = itertools.cycle(kinds)
    return lambda name, shape: next(turn) if len(shape) == 2 and "rel_b" not in name and shape[1] % 256 == 0 else "F32"


def umt5(folder, model):
    """(a UMT5's GGUF file with this tokenizer, its twin as ComfyUI's file)"""
    config = UMT5Config(vocab_size=64, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_layers=2, dropout_rate=0.0)
    network = tiny_models.randomise(UMT5EncoderModel(config), 3).eval()
    state = {as_llama_cpp(name, "t5"): x for name, x in network.state_dict().items()
             if name != "encoder.embed_tokens.weight"}  # fmt: skip
    kinds = in_turn(("Q8_0", "Q4_K", "Q6_K", "Q3_K", "F16", "Q5_1"))
    twin = gguf_files.write(folder / "umt5.gguf", state, kinds, 3, "t5", t5_fields(model))
    own = load_file(twin)
    names = {as_llama_cpp(name, "t5"): name for name in network.state_dict() if name != "encoder.embed_tokens.weight"}
    tensors = {names[name]: x for name, x in own.items()}
    save_file(tensors | {"spiece_model": torch.tensor(list(model), dtype=torch.uint8)}, folder / "twin.safetensors")
    return folder / "umt5.gguf", folder / "twin.safetensors"


def test_a_umt5_equals_its_twin(tmp_path, spiece):
    """With the tokenizer in its header, which core ComfyUI's nodes get too."""
    file, twin = umt5(tmp_path, spiece)
    made = {}
    for path in (file, twin):
        loaded = Components(torch.device("cpu")).get(TextEncoderSpec(path=str(path), dtype="float32"), lambda *_: None)
        encoder, encoding = loaded.encoders["text_encoder"], loaded.encoding
        with torch.no_grad():
            made[path] = encoding.encode(loaded.encoders, TEXTS[0], lambda *_: None)["text"]
        held = encoding.tokenizer_file("text_encoder", path, path)
        assert held.sentencepiece and encoder.tokenizer(TEXTS[0], truncation=False).input_ids.shape[1] > 4
    assert made[file].std() > 0.1
    assert_close(made[file], made[twin], atol=1e-4, rtol=0.0)


def test_a_tokenizer_in_a_header_makes_the_pieces_of_its_model(tmp_path, spiece):
    """Its character map too. One that lacks a part is none; one whose parts do not fit is refused."""
    expected = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    state = {"token_embd.weight": torch.ones(64, 32)}
    gguf_files.write(tmp_path / "t5.gguf", state, lambda *_: "F32", 0, "t5", t5_fields(spiece))
    made = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(tmp_path / "t5.gguf"))
    assert [made.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    assert (made.eos_id(), made.unk_id(), made.pad_id()) == (1, 2, 0) and made.vocab_size() == expected.vocab_size()

    def without_scores(writer):
        writer.add_tokenizer_model("t5")
        writer.add_token_list([b"a", b"b"])

    gguf_files.write(tmp_path / "less.gguf", state, lambda *_: "F32", 0, "t5", without_scores)
    assert sentencepiece_model(tmp_path / "less.gguf") is None

    def with_two_scores(writer):
        without_scores(writer)
        writer.add_token_scores([0.0])
        writer.add_token_types([1, 1])

    gguf_files.write(tmp_path / "wrong.gguf", state, lambda *_: "F32", 0, "t5", with_two_scores)
    with pytest.raises(ValueError, match="AV-1411.*2 pieces, 1 scores"):
        sentencepiece_model(tmp_path / "wrong.gguf")


def test_a_llama_equals_its_twin(tmp_path):
    """Its queries and keys in the order of transformers. The tokenizer comes from its folder."""
    folder = tiny_llava.save(tmp_path / "model")
    llama, clip = hunyuan_encoders.save_files(tmp_path, folder)
    tensors = {name.removeprefix("model."): x for name, x in load_file(llama).items() if name != "lm_head.weight"}
    rows = {one: len(tensors[f"layers.0.self_attn.{one}_proj.weight"]) for one in "qk"}
    numbers = {one: count // tiny_llava.LLAMA_HEAD_DIM for one, count in rows.items()}
    state = {}
    for name, x in tensors.items():
        part = next((one for one in "qk" if f"self_attn.{one}_proj" in name), None)
        state[as_llama_cpp(name, "llama")] = turned(x, numbers[part]) if part else x

    def fields(writer):
        writer.add_head_count(numbers["q"])
        writer.add_head_count_kv(numbers["k"])

    kinds = itertools.cycle(("Q8_0", "F16", "Q5_0", "BF16"))
    twin = load_file(gguf_files.write(
        tmp_path / "llama.gguf", state,
        lambda name, shape: next(kinds) if len(shape) == 2 and shape[1] % 32 == 0 else "F32", 5, "llama", fields,
    ))  # fmt: skip
    restored = {}
    for name in tensors:
        x = twin[as_llama_cpp(name, "llama")]
        part = next((one for one in "qk" if f"self_attn.{one}_proj" in name), None)
        if part:
            x = x.unflatten(0, (numbers[part], -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        restored[f"model.{name}"] = x
    save_file(restored, tmp_path / "twin.safetensors")
    tokenizers = {"tokenizer_path": str(folder / "tokenizer"), "tokenizer_path_2": str(folder / "tokenizer_2")}
    made, expected = (
        hunyuan_encoders.encoded(hunyuan_encoders.load(path, clip, dtype="float32", **tokenizers))[0]
        for path in (tmp_path / "llama.gguf", tmp_path / "twin.safetensors")
    )
    assert expected.std() > 0.1
    assert_close(made, expected, atol=1e-4, rtol=0.0)
