"""The memory that a VAE takes: what is told before is what is taken, and a longer video takes no more of it."""

from collections import deque

import pytest
import tiny_models
import torch
from ascend_runtime import VaeSpec
from ascend_runtime.models.hunyuan_video.vae import video_vae
from ascend_runtime.models.wan.vae import streamed as wan_vae
from ascend_runtime.ops.memory import most_allocated
from ascend_runtime.parallel.tiles import single_tile
from ascend_runtime.models.shared.tiling import KERNEL_MARGIN, margin
from diffusers import AutoencoderKLHunyuanVideo
from msgspec.structs import replace
from benchmarks.memory import GIVES_BACK, highest_rss, rss

VAES = {"2.1": (tiny_models.wan_vae, 16, 8), "2.2": (tiny_models.wan22_vae, 48, 16)}  # maker, channels, pixels
WORKS = ("decode", "encode")
SMALL, LARGE, NARROW = (2, 2), (32, 32), (16, 8)  # a latent's


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The description of one of Wan 2.1's form."""
    folder = tmp_path_factory.mktemp("vae")
    tiny_models.randomise(tiny_models.wan_vae(), 3).save_pretrained(folder / "vae")
    return VaeSpec(path=str(folder))


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    """The description of one of HunyuanVideo's form."""
    folder = tmp_path_factory.mktemp("hunyuan")
    tiny_models.randomise(tiny_models.hunyuan_vae(), 3).save_pretrained(folder / "vae")
    return VaeSpec(path=str(folder))


@pytest.fixture(scope="module")
def thrifty(new_runtime, vae):
    """Two ranks whose malloc gives back what is freed."""
    with new_runtime(2, **GIVES_BACK) as runtime:
        for work in WORKS:  # loads, and fills what libraries keep
            done(runtime, vae, work, 3, SMALL)
        yield runtime


def done(runtime, vae, work, frames, size, **hooks):
    """Decodes a latent of so many frames and this size, or encodes a video of which such a latent is made."""
    height, width = size
    if work == "decode":
        return runtime.decode(vae, torch.zeros(1, 16, frames, height, width), **hooks)
    return runtime.encode_video(vae, torch.zeros(4 * frames - 3, 8 * height, 8 * width, 3), **hooks)


def own_peaks(runtime, *job):
    """The highest RSS of each rank within a job, less what of it are files, which the kernel takes back from those who
    wait and gives again, and memory that it shares: of frames and latent."""
    mapped = {pid: [] for pid in runtime.pids}

    def look(*_):
        for pid, seen in mapped.items():
            seen.append(rss(pid, "RssShmem") + rss(pid, "RssFile"))

    with highest_rss(runtime.pids) as highest:
        done(runtime, *job, on_progress=look)
    return [highest[pid] - max(seen) for pid, seen in mapped.items()]


def own(runtime):
    """Bytes of each rank now, less the same."""
    return [rss(pid, "RssAnon") for pid in runtime.pids]


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("work", WORKS)
@torch.no_grad()
def test_what_is_told_is_what_tensors_take(name, work):
    """To the byte, by a real run whose frames come one after the other; a longer one takes no more."""
    maker, channels, pixels = VAES[name]
    vae, (height, width) = wan_vae.streamed(maker()), (4, 6)
    told = wan_vae.bytes_needed(vae, work, height, width)

    def taken(frames):
        if work == "decode":
            latent = (torch.zeros(channels, height, width) for _ in range(frames))
            passes = wan_vae.decoded(vae, latent, single_tile(height, width))
        else:
            sizes = [1, *[wan_vae.FRAMES] * (frames - 1)]
            groups = (torch.zeros(3, size, pixels * height, pixels * width) for size in sizes)
            passes = wan_vae.encoded(vae, groups, single_tile(height, width))
        return most_allocated(lambda: deque(passes, maxlen=1))

    few, many = taken(3), taken(9)
    print(f"Wan {name} {work}: told {told} bytes, taken {few} and {many}")
    assert few == many == told


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("work", WORKS)
def test_a_larger_tile_is_told_to_take_more(name, work):
    """In proportion to its pixels, nearly."""
    vae = VAES[name][0]()
    one, wide, both = (wan_vae.bytes_needed(vae, work, *size) for size in ((8, 8), (8, 16), (16, 16)))
    assert 1.8 < wide / one < 2.05 and 1.8 < both / wide < 2.05
    assert 0.5 * one < wan_vae.bytes_needed(vae.bfloat16(), work, 8, 8) < 0.7 * one


@pytest.mark.parametrize("work", WORKS)
def test_what_is_told_is_what_ranks_take(thrifty, vae, work):
    idle = own(thrifty)
    height, width = LARGE
    told = wan_vae.bytes_needed(tiny_models.wan_vae(), work, height, width // 2)
    taken = [peak - before for peak, before in zip(own_peaks(thrifty, vae, work, 3, LARGE), idle)]
    print(f"{work}: told {told / 1e6:.1f} MB, taken " + ", ".join(f"{each / 1e6:.1f}" for each in taken))
    assert all(told / KERNEL_MARGIN < each < KERNEL_MARGIN * told for each in taken)


@pytest.mark.parametrize("work", WORKS)
def test_ranks_that_keep_what_is_freed_take_no_more_than_is_asked_for(two_ranks, vae, work):
    """As they are started, with the heap that is fast and has holes."""
    done(two_ranks, vae, work, 3, SMALL)  # loads, and fills what libraries keep
    two_ranks.ping()  # by when they have given back what they kept
    idle = own(two_ranks)
    height, width = LARGE
    needed = margin(torch.device("cpu")) * wan_vae.bytes_needed(tiny_models.wan_vae(), work, height, width // 2)
    taken = [peak - before for peak, before in zip(own_peaks(two_ranks, vae, work, 9, LARGE), idle)]
    print(f"{work}: asked for {needed / 1e6:.1f} MB, taken " + ", ".join(f"{each / 1e6:.1f}" for each in taken))
    assert max(taken) < needed < 3 * min(taken)


@pytest.mark.parametrize("work", WORKS)
def test_129_frames_take_no_more_than_17(thrifty, vae, work):
    """Beside the frames themselves, which lie in memory that is shared."""
    height, width = NARROW
    own_peaks(thrifty, vae, work, 2, NARROW)
    few, many = (own_peaks(thrifty, vae, work, frames, NARROW) for frames in (5, 33))
    tile = (129 - 17) * 8 * height * 8 * width * 12 / 2  # bytes of what more frames a rank has
    print(f"{work}: " + ", ".join(f"{(b - a) / 1e6:+.2f} MB" for a, b in zip(few, many)) + f" of {tile / 1e6:.1f}")
    assert all(b - a < tile / 4 for a, b in zip(few, many))


# HunyuanVideo's, in which all frames pass a layer before the next one


@pytest.mark.parametrize("work, dtype", [("decode", torch.bfloat16), ("encode", torch.float32)])
@torch.no_grad()
def test_hunyuans_prediction_is_what_tensors_take(work, dtype):
    """To 1 %, by a real run; two tensors of all frames, in the widest layer, and chunks of four frames."""
    vae = tiny_models.on_ranks(torch.nn.Module.to(tiny_models.hunyuan_vae(), dtype))
    frames, height, width = 7, 4, 6
    predicted = vae.bytes_needed(work, frames, height, width)
    shapes = [(16, 1, height, width)] * frames
    if work == "encode":
        shapes = [(3, 1 if index == 0 else 4, 8 * height, 8 * width) for index in range(frames)]
    given = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    passes = (vae.decoded if work == "decode" else vae.encoded)(given, single_tile(height, width))
    taken = most_allocated(lambda: deque(passes, maxlen=1))
    widest = 32 * (4 * frames - 3) * 64 * height * width * dtype.itemsize
    print(f"{work} in {dtype}: {predicted} bytes, {predicted / widest:.2f} tensors of all frames; taken {taken}")
    assert taken <= predicted <= 1.01 * taken and predicted < 3 * widest


@pytest.mark.parametrize("work", WORKS)
def test_hunyuans_prediction_of_many_frames_is_a_dry_runs(work, monkeypatch):
    """To the byte."""
    vae = tiny_models.on_ranks(tiny_models.hunyuan_vae())
    quick = vae.bytes_needed(work, 7, 6, 10, tiles=8)
    monkeypatch.setattr(video_vae, "FEW_FRAMES", 7)
    assert quick == vae.bytes_needed(work, 7, 6, 10, tiles=8)


@pytest.mark.parametrize("work", WORKS)
def test_a_full_width_video_takes_two_tensors_of_all_frames(work):
    """1280 x 720 x 129 in bfloat16 on 8 ranks: of 128 channels, 3.8 GB each."""
    with torch.device("meta"):
        network = torch.nn.Module.to(AutoencoderKLHunyuanVideo(), torch.bfloat16)
    vae, tensor = tiny_models.on_ranks(network), 128 * 129 * 360 * 320 * 2
    predicted = vae.bytes_needed(work, 33, 45, 40, tiles=8)
    print(f"{work}: {predicted / 1e9:.2f} GB, {predicted / tensor:.2f} tensors of {tensor / 1e9:.2f} GB")
    assert 2 * tensor < predicted < 2.25 * tensor


@pytest.mark.parametrize("work, tiles, size", [("decode", "whole", (3, 16, 24)), ("encode", "published", (3, 40, 8))])
def test_hunyuans_prediction_is_what_ranks_take(thrifty, hunyuan, work, tiles, size):
    spec, (frames, height, width) = replace(hunyuan, tiles=tiles), size
    done(thrifty, spec, work, 2, SMALL)
    idle = own(thrifty)
    vae = tiny_models.on_ranks(tiny_models.hunyuan_vae())
    tile = (frames, height, width // 2) if tiles == "whole" else (frames, 32, width)
    predicted = vae.bytes_needed(work, *tile, tiles=2)
    taken = [peak - before for peak, before in zip(own_peaks(thrifty, spec, work, frames, (height, width)), idle)]
    print(f"{work} {tiles}: {predicted / 1e6:.1f} MB, taken " + ", ".join(f"{each / 1e6:.1f}" for each in taken))
    assert max(taken) < KERNEL_MARGIN * predicted and max(taken) > predicted / KERNEL_MARGIN
