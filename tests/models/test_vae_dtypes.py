"""What a VAE's dtype costs, and how often its work waits for the device."""

import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_models
import torch
from ascend_runtime.engine import video
from ascend_runtime.ops import OPERATORS_VARIABLE
from ascend_runtime.ops.precision import check_strict, strict_float32
from ascend_runtime.specs import VaeSpec
from diffusers import AutoencoderKLWan
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from tiny_wan import world  # noqa: E402

LEAST_PSNR = 45  # dB
WAYS = ["torch", "npu"]
pytestmark = pytest.mark.usefixtures("one_rank_group")


@pytest.fixture(scope="module")
def clip():
    """A video that the embedded VAE was not trained on, [T=5, H, W, 3] in 0..1, and its latent by diffusers."""
    (shown,) = world.render(world.held_out_scenes()[7:8], torch.Generator().manual_seed(3), num_frames=5)
    with torch.no_grad():
        latent = embedded().encode(shown[None]).latent_dist.mode()
    return shown.movedim(0, -1) / 2 + 0.5, latent


def embedded(dtype=torch.float32):
    """diffusers' own."""
    vae = AutoencoderKLWan.from_pretrained(ROOT / "assets" / "tiny_wan" / "vae").eval()
    return torch.nn.Module.to(vae, dtype)


@torch.no_grad()
def decoded(vae, latent):
    _, _, frames, height, width = latent.shape
    out = torch.empty(4 * frames - 3, 8 * height, 8 * width, 3)
    video.decode_video(tiny_models.on_ranks(vae), latent, out, lambda *_: None)
    return out


@torch.no_grad()
def encoded(vae, frames):
    length, height, width, _ = frames.shape
    out = torch.empty(1, 16, (length + 3) // 4, height // 8, width // 8)
    video.encode_video(tiny_models.on_ranks(vae), frames, out, lambda *_: None)
    return out


def psnr(frames, reference):
    """dB, of frames in 0..1."""
    return -10 * math.log10((frames - reference).double().square().mean())


@pytest.mark.parametrize("way", WAYS)
def test_the_embedded_vae_in_bfloat16_shows_what_it_shows_in_float32(monkeypatch, clip, way):
    """Against diffusers' in float32; way: whose operators, of which an NPU's round more."""
    monkeypatch.setenv(OPERATORS_VARIABLE, way)
    frames, latent = clip
    with torch.no_grad():
        exact = embedded().decode(latent).sample[0].movedim(0, -1) / 2 + 0.5
    full, half = (psnr(decoded(embedded(dtype), latent), exact) for dtype in (torch.float32, torch.bfloat16))
    kept = psnr(exact, frames)
    print(f"{way}: float32 {full:.1f} dB, bfloat16 {half:.1f} dB from diffusers' float32; the clip {kept:.1f} dB")
    assert kept > 20, "the VAE does not show the clip"
    assert full > 90 and half >= LEAST_PSNR
    again = encoded(embedded(torch.bfloat16), frames)
    assert psnr(decoded(embedded(), again), exact) >= LEAST_PSNR - 5, "a latent that bfloat16 encoded"


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_hunyuans_vae_in_16_bits_shows_what_it_shows_in_float32(monkeypatch, way):
    """Against diffusers' in float32, with random weights: no worse than diffusers' in the same dtype."""
    monkeypatch.setenv(OPERATORS_VARIABLE, way)
    latent = torch.randn(1, 16, 2, 2, 3, generator=torch.Generator().manual_seed(4))
    exact = shown(random_hunyuan(), latent)
    full = psnr(decoded(random_hunyuan(), latent), exact)
    for dtype in (torch.bfloat16, torch.float16) if way == "torch" else (torch.bfloat16,):
        half, theirs = (psnr(make(random_hunyuan(dtype), latent), exact) for make in (decoded, shown))
        print(f"{way}: float32 {full:.1f} dB; {dtype} {half:.1f} dB, diffusers' {theirs:.1f} dB")
        assert half > max(theirs - 1, 35)
    assert full > 90


def random_hunyuan(dtype=torch.float32):
    return torch.nn.Module.to(tiny_models.randomise(tiny_models.hunyuan_vae(), 3), dtype)


def shown(vae, latent):
    """Frames by diffusers."""
    return (vae.decode(latent.to(vae.dtype)).sample[0].float().movedim(0, -1) / 2 + 0.5).clamp(0, 1)


def test_an_npus_way_equals_torchs_in_float32(monkeypatch, clip):
    """Attention is spelt out on an NPU."""
    made = []
    for way in WAYS:
        monkeypatch.setenv(OPERATORS_VARIABLE, way)
        made.append(decoded(embedded(), clip[1]))
    assert (made[0] - made[1]).abs().max() < 1e-5


# Waiting


class Waits(TorchDispatchMode):
    """Counts the values that are read from a device, which waits for it, and copies into memory of another tensor."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.seen[operator.name().partition(".")[0]] += 1
        return operator(*arguments, **(keywords or {}))


@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("make", [tiny_models.wan_vae, tiny_models.hunyuan_vae])
def test_no_value_is_read_from_the_device_for_a_latent_frame(make, work):
    """Only for a video: what is given, and what was made, may hold NaN."""
    reads = []
    for frames in (2, 5):
        with Waits() as waits:
            vae = make()
            if work == "decode":
                decoded(vae, torch.zeros(1, 16, frames, 2, 2))
            else:
                encoded(vae, torch.zeros(4 * frames - 3, 16, 16, 3))
        reads.append(waits.seen["aten::_local_scalar_dense"])
    print(f"{work}: {reads} values read, of videos of 2 and of 5 latent frames")
    assert reads[0] == reads[1] <= 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_in_the_last_frame_is_reported(monkeypatch, value):
    vae = tiny_models.on_ranks(tiny_models.wan_vae())
    make = vae.encoded

    def spoilt(*given):
        *good, last = make(*given)
        last[3, 0, 1, 1] = value
        return iter([*good, last])

    monkeypatch.setattr(vae, "encoded", spoilt)
    where = "The encoded video has NaN or infinite values in the latent's frame 2 of 2, rows 0 to 1"
    with pytest.raises(ValueError, match=where):
        with torch.no_grad():
            video.encode_video(vae, torch.zeros(5, 16, 16, 3), torch.empty(1, 16, 2, 2, 2), lambda *_: None)


# Strict float32


def test_strict_float32_is_a_dtype_of_a_vae_only():
    assert VaeSpec(path="x", dtype="float32_strict").strict and not VaeSpec(path="x", dtype="float32").strict
    with pytest.raises(ValueError, match="float16, float32_strict"):
        VaeSpec(path="x", dtype="float64")


def test_a_cpu_computes_strictly_in_any_case():
    check_strict(torch.device("cpu"))
    with strict_float32(torch.device("cpu")):
        pass


def test_cuda_does_not_round_to_tf32_within_strict_float32():
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [one.allow_tf32 for one in switches]
    assert before[0], "torch's default"
    check_strict(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="left"), strict_float32(torch.device("cuda")):
        assert [one.allow_tf32 for one in switches] == [False, False]
        raise RuntimeError("left")
    assert [one.allow_tf32 for one in switches] == before
