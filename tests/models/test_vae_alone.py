"""A VAE on one rank: videos that were left behind, dtypes that are narrow, and frames that no memory holds."""

import pytest
import tiny_models
import torch
from ascend_runtime.hardware import devices
from ascend_runtime.engine import video

VAES = {"2.1": (tiny_models.wan_vae, 16, 8), "2.2": (tiny_models.wan22_vae, 48, 16)}  # maker, channels, pixels
pytestmark = pytest.mark.usefixtures("one_rank_group")


def made(name, dtype=torch.float32):
    """diffusers' own."""
    vae = tiny_models.randomise(VAES[name][0](seed=1), 3)
    return torch.nn.Module.to(vae, dtype)


class Left(Exception):
    pass


@torch.no_grad()
def test_a_video_that_was_left_does_not_touch_the_next():
    """Though what it has come to lives on, as an exception keeps it, and is gone in the midst of the next."""
    ours, theirs = tiny_models.on_ranks(made("2.1")), made("2.1")
    latent = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    left = []

    def leave(frame, total):
        if frame == 3:
            raise Left

    def forget(frame, total):
        if frame == 2:
            left.clear()

    with pytest.raises(Left) as raised:
        video.decode_video(ours, torch.randn(latent.shape), torch.empty(9, 32, 48, 3), leave)
    left.append(raised._excinfo[1])
    del raised
    frames = torch.full((9, 32, 48, 3), torch.nan)
    video.decode_video(ours, latent, frames, forget)
    wanted = theirs.decode(latent).sample[0].movedim(0, -1) / 2 + 0.5
    assert not left and (frames - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_narrow_dtypes_lose_no_more_than_in_diffusers(name, dtype):
    """Against fp32, by the mean; the numbers are the same of each run."""
    ours, theirs, exact = tiny_models.on_ranks(made(name, dtype)), made(name, dtype), made(name)
    _, channels, pixels = VAES[name]
    generator = torch.Generator().manual_seed(2)
    latent, frames = torch.randn(1, channels, 3, 5, 4, generator=generator), torch.empty(9, 5 * pixels, 4 * pixels, 3)
    video.decode_video(ours, latent, frames, lambda *_: None)
    wanted, narrow = (vae.decode(latent.to(vae.dtype)).sample[0].movedim(0, -1) / 2 + 0.5 for vae in (exact, theirs))
    no_worse(f"Wan {name} {dtype} decode", frames - wanted, narrow - wanted)

    frames, result = torch.rand(9, 5 * pixels, 4 * pixels, 3, generator=generator), torch.empty_like(latent)
    video.encode_video(ours, frames, result, lambda *_: None)
    given = frames.movedim(-1, 0)[None] * 2 - 1
    wanted, narrow = (vae.encode(given.to(vae.dtype)).latent_dist.mode() for vae in (exact, theirs))
    no_worse(f"Wan {name} {dtype} encode", result - wanted, narrow - wanted)


def test_frames_that_the_host_cannot_hold_are_refused(monkeypatch):
    ours, latent, frames = tiny_models.on_ranks(made("2.1")), torch.zeros(1, 16, 3, 2, 2), torch.empty(9, 16, 16, 3)
    monkeypatch.setattr(devices, "host_memory", lambda: frames.nbytes - 1)
    with pytest.raises(ValueError, match="9 frames of 16 x 16 pixels.* Make at most 8 frames of this size"):
        video.decode_video(ours, latent, frames, lambda *_: pytest.fail("it has begun"))


@torch.no_grad()
def test_a_narrow_vae_sees_frames_that_were_rounded_once():
    """As core's and diffusers' do: rounded in 0..1, before they are made -1..1, they would be twice as far off."""
    vae, seen = tiny_models.on_ranks(made("2.1", torch.bfloat16)), []
    frames = torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(2))
    vae.network.encoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0]))
    video.encode_video(vae, frames, torch.empty(1, 16, 2, 2, 2), lambda *_: None)
    assert torch.equal(torch.cat(seen, dim=1), (frames.movedim(-1, 0) * 2 - 1).bfloat16())


def no_worse(what, ours, theirs):
    ours, theirs = (error.abs().mean().item() for error in (ours, theirs))
    print(f"{what}: {ours:.2e}, diffusers' {theirs:.2e}")
    assert ours < 1.1 * theirs
