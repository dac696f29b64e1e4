"""Tokens that were made elsewhere are encoded as they are, on one rank's CPU or on all ranks, once."""

import hunyuan_encoders as encoders
import pytest
import tiny_llava
import torch
from ascend_runtime import TextEncoderSpec
from ascend_runtime.client.arguments import MAX_TEXT_TOKENS
from benchmarks.opens import Opened
from torch.testing import assert_close
from transformers import CLIPTextModel, LlamaModel, UMT5EncoderModel

TEXT, SECOND = "text_encoder", "text_encoder_2"
PLACED = [(1, "cpu"), (2, "cpu"), (2, "ranks")]


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return tiny_llava.save(tmp_path_factory.mktemp("tokens"), seed=11)


def random_ids(rng, length: int, below: int) -> torch.Tensor:
    return torch.tensor([rng.randrange(3, below) for _ in range(length)])


def spec(folder, placement: str) -> TextEncoderSpec:
    return TextEncoderSpec(path=str(folder), placement=placement)


@pytest.mark.parametrize("ranks, placement", PLACED)
@torch.no_grad()
def test_tokens_equal_transformers(runtimes, checkpoint, rng, ranks, placement):
    """As they are: the end is where it was given, and zeros follow; a text may be longer than in training."""
    network = UMT5EncoderModel.from_pretrained(checkpoint / TEXT).eval()
    for length, total in ((7, 20), (600, 600)):
        ids = random_ids(rng, total, network.config.vocab_size)
        made = runtimes(ranks).encode_tokens(spec(checkpoint, placement), TEXT, ids, length).tensor
        expected = network(ids[None, :length]).last_hidden_state
        assert made.shape == (1, total, expected.shape[2]) and expected.std() > 0.01
        assert_close(made[:, :length], expected, atol=1e-4, rtol=1e-4)
        assert not made[:, length:].any()


@pytest.mark.parametrize("ranks, placement", PLACED)
@torch.no_grad()
def test_tokens_of_two_encoders_equal_transformers(runtimes, hunyuan, rng, ranks, placement):
    """No token of the Llama attends to padding; an image's tokens stand in the place of one; CLIP's first end token
    makes the pooled vector, whatever follows."""
    llama = LlamaModel.from_pretrained(hunyuan / TEXT).eval()
    ids, length = random_ids(rng, 12, llama.config.vocab_size), 9
    image = torch.randn(5, llama.config.hidden_size, generator=torch.Generator().manual_seed(rng.randrange(2**32)))
    embedded = llama.embed_tokens(ids[None])
    runtime, encoder = runtimes(ranks), spec(hunyuan, placement)
    with_image = torch.cat([embedded[:, :4], image[None], embedded[:, 5:]], 1)
    for images, embedded in (({}, embedded), ({4: image}, with_image)):
        made = runtime.encode_tokens(encoder, TEXT, ids, length, images).tensor
        mask = (torch.arange(embedded.shape[1]) < embedded.shape[1] - (12 - length)).long()[None]
        expected = llama(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
        assert_close(made, expected, atol=1e-4, rtol=1e-4)
    clip = CLIPTextModel.from_pretrained(hunyuan / SECOND).eval()
    ids = random_ids(rng, 30, 200)
    made = runtime.encode_tokens(encoder, SECOND, ids, 8)
    expected = clip(ids[None]).last_hidden_state
    assert_close(made.tensor, expected, atol=1e-4, rtol=1e-4)
    assert_close(made.tensors["pooled"], expected[:, 7], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("placement", ("cpu", "ranks"))
def test_equal_tokens_are_encoded_once(two_ranks, checkpoint, rng, placement):
    encoder, ids = spec(checkpoint, placement), random_ids(rng, 9, 40)
    first = two_ranks.encode_tokens(encoder, TEXT, ids, 9)
    assert "tokens" not in first.info
    two_ranks.free()
    with Opened(file for file in (checkpoint / TEXT).rglob("*.safetensors")) as opened:
        again = two_ranks.encode_tokens(encoder, TEXT, ids.clone(), 9)
    assert again.info["tokens"] == "known" and opened.files() == [] and torch.equal(again.tensor, first.tensor)
    for other, length in ((ids, 8), (torch.cat([ids, ids[:1]]), 9), (ids.flip(0), 9)):
        assert "tokens" not in two_ranks.encode_tokens(encoder, TEXT, other, length).info


IDS = torch.arange(3, 9)
WRONG = {  # arguments: the error
    "a token that the encoder does not know": (dict(ids=IDS + 4000), "token 4008, but the text encoder has embeddings"),
    "a negative token": (dict(ids=IDS - 5), "the tokenizer belongs to another model"),
    "another encoder": (dict(part=SECOND), "no text encoder 'text_encoder_2'"),
    "floats": (dict(ids=IDS.float()), r"shape \[6\] and the dtype torch.float32; it must be \[S\], torch.int64"),
    "no tokens": (dict(ids=IDS[:0]), r"\[0\]"),
    "too many": (dict(ids=IDS.repeat(1000)), f"6,000 tokens; at most {MAX_TEXT_TOKENS:,} are accepted"),
    "an end after the last": (dict(length=7), "length is 7; it must be an int from 1 to the number of ids, 6"),
    "a place after the last": (dict(embeddings={6: torch.ones(2, 32)}), "places are from 0 to 5"),
    "an embedding of one axis": (dict(embeddings={1: torch.ones(32)}), r"\[n,D\]"),
    "an embedding": (dict(embeddings={1: torch.ones(2, 32)}), "reads tokens only, and no embeddings"),
    "NaN": (dict(embeddings={1: torch.full((2, 32), torch.nan)}), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_encoded_is_refused_by_name(two_ranks, checkpoint, case):
    given, says = WRONG[case]
    arguments = {"part": TEXT, "ids": IDS, "length": 6, "embeddings": None, **given}
    pids = two_ranks.pids
    with pytest.raises(ValueError, match=says):
        two_ranks.encode_tokens(spec(checkpoint, "ranks"), **arguments)
    assert two_ranks.ping().seconds == {} and two_ranks.pids == pids


def test_an_image_of_another_width_and_too_long_a_text_for_clip_are_refused(two_ranks, hunyuan):
    encoder = spec(hunyuan, "ranks")
    with pytest.raises(ValueError, match=r"have the shape \[2, 16\]; this text encoder reads \[n, 24\]"):
        two_ranks.encode_tokens(encoder, TEXT, IDS, 6, {1: torch.ones(2, 16)})
    with pytest.raises(ValueError, match="CLIP reads at most 77 tokens at once, and there are 78"):
        two_ranks.encode_tokens(encoder, SECOND, IDS.repeat(13), 70)


def test_text_encoders_say_what_they_are(two_ranks, checkpoint, hunyuan):
    """Without a weight read: their family, names and shapes, and the tokenizer that core takes from the encoder."""
    files = [file for folder in (checkpoint, hunyuan) for file in folder.rglob("model.safetensors")]
    with Opened(files) as opened:
        one, two = (two_ranks.text_encoders(spec(folder, "cpu")) for folder in (checkpoint, hunyuan))
    assert opened.files() == []
    facts = one.info["encoders"]
    assert facts["family"] == "wan" and facts["sentencepiece"] is False
    assert facts["shapes"][TEXT]["encoder.block.0.layer.0.SelfAttention.q.weight"] == [32, 32]
    assert one.tensor.numpy().tobytes() == (checkpoint / "tokenizer" / "tokenizer.json").read_bytes()
    facts = two.info["encoders"]
    assert facts["family"] == "hunyuan_video" and set(facts["shapes"]) == {TEXT, SECOND} and two.tensor is None
    names = encoders.clip_tensors(hunyuan, prefix="")
    assert set(facts["shapes"][SECOND]) <= set(names)
