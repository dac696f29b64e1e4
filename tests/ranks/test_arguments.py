"""A wrong argument of a public call is a ValueError in the caller, before any rank hears of it."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ascend_runtime import (
    AccelerationSpec,
    DiffusionModelSpec,
    LoraSpec,
    ParallelSpec,
    ProfileSpec,
    Runtime,
    SampleSpec,
    StepCacheSpec,
    TextEncoderSpec,
    VaeSpec,
)
from ascend_runtime.wire.messages import Conditioning

LATENT, FRAMES = torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 32, 32, 3)
HALF = "a cat \ud83d"  # what JSON has of an emoji that was cut


@pytest.fixture(scope="module")
def ranks(one_rank, specs):
    """Their process must be the same after the module's last test."""
    one_rank.load(specs.model)
    pids = one_rank.pids
    yield one_rank
    assert one_rank.pids == pids


def further(**entries):
    return Conditioning(text=torch.zeros(1, 4, 8), **entries)


CALLS = [
    (lambda r, s: r.encode(s.encoder, None), "The prompt is None; it must be one str"),
    (lambda r, s: r.encode(s.encoder, ["a cat", "a dog"]), "must be one str. Encode several prompts in separate calls"),
    (lambda r, s: r.encode(s.encoder, 5), "The prompt is 5"),
    (lambda r, s: r.encode(s.encoder, HALF), r"contains half a character \('\\ud83d', at position 6\)"),
    (lambda r, s: r.encode(s.encoder, "a" * 50_001), "50,001 characters; at most 50,000"),
    (lambda r, s: r.encode(s.vae, "a cat"), "encoder is of type VaeSpec; it must be a TextEncoderSpec"),
    (lambda r, s: r.encode(None, "a cat"), "encoder is None"),
    (lambda r, s: r.load("assets/tiny_wan"), "model is 'assets/tiny_wan'; it must be a DiffusionModelSpec or None"),
    (lambda r, s: r.load(parallel=2), "parallel is 2; it must be a ParallelSpec or None"),
    (lambda r, s: r.decode(s.vae, None), "latent is None; it must be a Tensor"),
    (lambda r, s: r.decode(s.vae, np.zeros((1, 16, 1, 4, 4))), "latent is of type ndarray"),
    (lambda r, s: r.decode(s.vae, LATENT[0]), r"The latent has the shape \[16, 1, 4, 4\]; it must be \[B,C,T,H,W\]"),
    (lambda r, s: r.decode(s.vae, LATENT.long()), "dtype torch.int64; it must be a float"),
    (lambda r, s: r.decode(s.vae, LATENT.to("meta")), r"has no data \(device meta\)"),
    (lambda r, s: r.decode(s.vae, LATENT.to_sparse()), "sparse"),
    (lambda r, s: r.decode(s.vae, torch.zeros(1).expand(1, 16, 10**5, 10**5, 10**5)), "which cannot be allocated"),
    (lambda r, s: r.decode(None, LATENT), "vae is None"),
    (lambda r, s: r.vae_form(str(s.folder)), "it must be a VaeSpec"),
    (lambda r, s: r.encode_video(s.vae, (FRAMES * 255).to(torch.uint8)), r"torch.uint8.* Give frames.float\(\) / 255"),
    (lambda r, s: r.encode_video(s.vae, FRAMES[..., :2]), r"\[1, 32, 32, 2\]; it must be \[T,H,W,3\]"),
    (lambda r, s: r.encode_video(s.vae, FRAMES[:0]), r"must be \[T,H,W,3\], each axis at least 1"),
    (lambda r, s: r.sample(s.model, SampleSpec(), None, s.text(1)), "latent is None"),
    (lambda r, s: r.sample(s.model, None, LATENT, s.text(1)), "spec is None"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, "a cat"), "positive is 'a cat'; it must be a Tensor or Cond"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, s.text(1), 5), "negative is 5"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, Conditioning(text=None)), "positive is None"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, Conditioning(text=LATENT, clip_vision=1)), "'s clip_vision"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(tensors={"mask": 1})), "positive's mask is 1"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(tensors=5)), "positive's tensors is 5; it must"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(tensors={"m": LATENT.to("meta")})), "has no data"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(numbers={"guidance": "6"})), "guidance is '6'"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(numbers={"guidance": math.nan})), "is nan; give"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(numbers={5: 1.0})), "named by a str of 1 to 64"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(numbers={HALF: 1.0})), "contains half a character"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(numbers={"a" * 65: 1.0})), "1 to 64 characters"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, further(numbers=dict.fromkeys(map(str, range(17))))),
     "numbers have 17 entries; there can be 16"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, s.text(1), noise_mask=True), "noise_mask is True"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, s.text(1), acceleration="fast"), "acceleration is 'fast'"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, s.text(1), operators=None), "operators is None"),
    (lambda r, s: r.sample(s.model, SampleSpec(), LATENT, s.text(1), profile="here"), "profile is 'here'"),
]


@pytest.mark.parametrize("call, says", CALLS, ids=[says for _, says in CALLS])
def test_a_call(ranks, specs, call, says):
    with pytest.raises(ValueError, match=says):
        call(ranks, specs)


@pytest.mark.parametrize("make, says", [
    (lambda: SampleSpec(steps=1.5), "steps is 1.5. Expected `int | None`, got `float`"),
    (lambda: SampleSpec(steps="5"), "steps is '5'"),
    (lambda: SampleSpec(seed=True), "seed is True. Expected `int`, got `bool`"),
    (lambda: SampleSpec(shift="high"), "shift is 'high'"),
    (lambda: SampleSpec(sigmas=(1.0, None)), "sigmas is"),
    (lambda: DiffusionModelSpec(path=5), "path is 5"),
    (lambda: DiffusionModelSpec(path=None), "path is None"),
    (lambda: DiffusionModelSpec(path="x", loras=("a.safetensors",)), "loras is"),
    (lambda: TextEncoderSpec(path="x", dtype=torch.float32), "dtype is torch.float32"),
    (lambda: VaeSpec(path=""), "path is '', which is not a valid path"),
    (lambda: VaeSpec(path="a\0b"), "which is not a valid path"),
    (lambda: VaeSpec(path="x" * 5000), "path is of 5000 characters"),
    (lambda: VaeSpec(path=os.fsdecode(b"m/a\xff")), "which is not valid UTF-8. Rename"),
    (lambda: ProfileSpec(folder=HALF), "which is not valid UTF-8"),
    (lambda: LoraSpec(path="x", strength="1"), "strength is '1'"),
    (lambda: ParallelSpec(ranks=2.0), "ranks is 2.0"),
    (lambda: ParallelSpec(fsdp=1), "fsdp is 1"),
    (lambda: StepCacheSpec(method=3), "method is 3"),
    (lambda: AccelerationSpec(step_cache="teacache"), "step_cache is 'teacache'"),
    (lambda: Runtime("2"), "parallel is '2'; it must be a ParallelSpec"),
    (lambda: Runtime(environment=["A=1"]), "environment is .*; it must be a dict or None"),
    (lambda: Runtime(environment={"A": 1}), r"environment\['A'\] is 1; it must be a str"),
])  # fmt: skip
def test_a_description(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_stands_for_a_value_is_taken():
    spec = SampleSpec(steps=np.int64(3), shift=5, guidance_scale=np.float32(1.5), sigmas=list(np.linspace(1, 0, 3)))
    assert (spec.steps, spec.shift, spec.guidance_scale, spec.sigmas) == (3, 5.0, 1.5, (1.0, 0.5, 0.0))
    assert all(type(value) in (int, float) for value in (spec.steps, spec.shift, *spec.sigmas))
    assert VaeSpec(path=Path("/models/vae")).path == "/models/vae"
    assert not math.isnan(spec.shift) and hash(spec) == hash(SampleSpec(steps=3, shift=5.0, guidance_scale=1.5,
                                                                       sigmas=(1.0, 0.5, 0.0)))  # fmt: skip


def test_a_message_too_large_to_be_read_is_not_sent(ranks, specs):
    lora = LoraSpec(path="/" + "x" * 4000)
    with pytest.raises(ValueError, match="Choose has .* bytes without its tensors; at most 67108864 can be sent"):
        ranks.load(DiffusionModelSpec(path=specs.model.path, loras=(lora,) * 17_000))


def test_a_file_whose_name_is_no_text_is_named(ranks, tmp_path):
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff.safetensors"))).write_bytes(b"x" * 70)
    with pytest.raises(ValueError, match=r"a\\udcff.safetensors"):
        ranks.load(vae=VaeSpec(path=str(tmp_path)))
