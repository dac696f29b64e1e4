"""(f) The VAE on each card played: full-width Wan VAEs decode and encode fake frames on "npu", and every convolution
and matrix product is one that the card's rules allow. Nothing of it waits for the device.

Contract, not device: meta kernels give the shapes and dtypes.
"""

from collections import Counter

import pytest
import torch
from ascend_runtime.hardware import devices
from ascend_runtime.models.hunyuan_video.vae import layers
from ascend_runtime.models.wan.vae import streamed
from ascend_runtime.ops import card_rules
from ascend_runtime.ops.finite import Extremes
from ascend_runtime.ops.precision import check_strict, strict_float32
from ascend_runtime.parallel.tiles import single_tile
from card_checks import CAST, CardChecks
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NPU = torch.device("npu", 0)
EVERYWHERE = (slice(None), slice(None), slice(None))
BF16, FP32 = torch.bfloat16, torch.float32
CARDS = list(card_rules.SERIES)
WAN22 = dict(base_dim=160, decoder_base_dim=256, z_dim=48, in_channels=12, out_channels=12, patch_size=2,
             is_residual=True, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48)  # fmt: skip
VAES = {"2.1": ({}, 16, 8), "2.2": (WAN22, 48, 16)}  # config, channels, pixels
WORKS = ("decode", "encode")
SIZE, FRAMES = (6, 8), 2  # of a latent
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class Calls(TorchDispatchMode):
    """Notes torch's operators on "npu" tensors, and copies to and from the host."""

    def __init__(self):
        super().__init__()
        self.made, self.convolutions, self.to_host = Counter(), [], 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        made = operator(*arguments, **(keywords or {}))
        name = operator.name().partition(".")[0].removeprefix("aten::")
        self.made[name] += 1
        if name == "convolution":
            self.convolutions.append((arguments[1].shape[-2:], arguments[3], arguments[4][-2:], arguments[0].shape))
        from_npu = any(isinstance(one, torch.Tensor) and one.device.type == "npu" for one in arguments)
        self.to_host += from_npu and isinstance(made, torch.Tensor) and made.device.type == "cpu"
        return made


@pytest.fixture
def play(monkeypatch):
    """`play(card)`: devices are such cards, and calls on fake tensors are held to its rules."""

    def played(card):
        monkeypatch.setattr(devices, "card", lambda device: card)
        return CardChecks(card)

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield played


def vae_of(name, dtype):
    """One of fake weights on "npu", which streams."""
    vae = streamed.streamed(AutoencoderKLWan(**VAES[name][0]).eval())
    with_fake_weights(vae, dtype)
    return vae


def with_fake_weights(vae, dtype):
    for path, parameter in list(vae.named_parameters()):
        owner, _, last = path.rpartition(".")
        made = torch.empty(parameter.shape, dtype=dtype, device=NPU)
        vae.get_submodule(owner)._parameters[last] = torch.nn.Parameter(made, requires_grad=False)


def run(name, work, dtype):
    """Decodes or encodes a video, and notes whether it is finite."""
    (_, channels, pixels), (height, width) = VAES[name], SIZE
    vae, seen, tile = vae_of(name, dtype), Extremes(3, FRAMES), single_tile(height, width)
    if work == "decode":
        given = [torch.empty(channels, height, width, dtype=dtype, device=NPU) for _ in range(FRAMES)]
        made = streamed.decoded(vae, given, tile)
    else:
        lengths = [1] + [streamed.FRAMES] * (FRAMES - 1)
        given = [torch.empty(3, n, pixels * height, pixels * width, dtype=dtype, device=NPU) for n in lengths]
        made = streamed.encoded(vae, given, tile)
    for frames in made:
        assert frames.dtype == dtype and frames.device == NPU
        seen.see(frames, EVERYWHERE)


@pytest.mark.parametrize("name, dtype", [("2.1", BF16), ("2.1", FP32), ("2.2", BF16)])
@pytest.mark.parametrize("card", CARDS)
def test_a_vae_calls_what_its_card_has(play, card, name, dtype):
    for work in WORKS:
        with play(card) as checks:
            run(name, work, dtype)
        print(card, name, work, dtype, dict(checks.checked))
        assert checks.checked["convolution"] > 20 * FRAMES and checks.checked["matmul"] == 2 * FRAMES
        assert not {"npu_fusion_attention", "npu_fusion_attention_v3"} & checks.checked.keys()


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", VAES)
def test_nothing_waits_for_the_device_and_kernels_pad(play, name, work):
    play("a2")
    with Calls() as calls:
        run(name, work, BF16)
    assert not calls.to_host and not [name for name in WAITING if calls.made[name]], calls.made
    padded = [padding for kernel, stride, padding, _ in calls.convolutions if kernel == (3, 3) and stride[-1] == 1]
    assert len(padded) > 20 * FRAMES and all(list(padding) == [1, 1] for padding in padded)
    assert not calls.made["constant_pad_nd"] or name == "2.2", "AvgDown3D of Wan 2.2 pads in time"


def test_a_norm_takes_three_operators_and_no_conversion(play):
    play("a2")
    norm = next(module for module in vae_of("2.1", BF16).modules() if isinstance(module, streamed.ScaledNorm))
    x = torch.empty(1, norm.gamma.shape[0], 4, *SIZE, dtype=BF16, device=NPU)
    with Calls() as calls:
        norm.write_activated(torch.empty_like(x), x)
    conversions = {"_to_copy", f"npu::{CAST}"}
    small = conversions | {"empty_like", "clamp_min_", "prim::device"}
    whole = {name: count for name, count in calls.made.items() if name not in small}
    assert whole == {"linalg_vector_norm": 1, "div": 1, "mul": 1, "mul_": 1, "silu": 1}  # mul: gamma, of C values
    assert sum(calls.made[name] for name in conversions) == 1, "the lengths, of one value a pixel"


# HunyuanVideo's


def hunyuan_run(work, dtype):
    """Decodes or encodes frames with the full-width VAE of fake weights on "npu"."""
    network, (height, width) = AutoencoderKLHunyuanVideo().eval(), SIZE
    with_fake_weights(network, dtype)
    shapes = [(16, 1, height, width)] * FRAMES
    if work == "encode":
        shapes = [(3, length, 8 * height, 8 * width) for length in [1] + [4] * (FRAMES - 1)]
    given = [torch.empty(shape, dtype=dtype, device=NPU) for shape in shapes]
    seen = Extremes(3, FRAMES)
    for frames in (layers.decoded if work == "decode" else layers.encoded)(network, given, single_tile(height, width)):
        if frames is not None:
            assert frames.dtype == dtype and frames.device == NPU
            seen.see(frames, EVERYWHERE)


@pytest.mark.parametrize("card, work, dtype", [
    *((card, work, BF16) for card in CARDS for work in WORKS), ("a3", "decode", torch.float16), ("a2", "decode", FP32),
])  # fmt: skip
def test_hunyuans_vae_calls_what_its_card_has(play, card, work, dtype):
    """Each norm reads its statistics chunk by chunk, in float32, and is one operator after that."""
    norms = 30 if work == "decode" else 22
    with play(card) as checks, Calls() as calls:
        hunyuan_run(work, dtype)
    print(card, work, dtype, dict(checks.checked))
    assert checks.checked["convolution"] > 20 * FRAMES
    assert checks.checked["var_mean"] == checks.checked["native_batch_norm"] == norms * FRAMES
    assert not {"npu_fusion_attention", "npu_fusion_attention_v3", "native_group_norm"} & calls.made.keys()
    assert not calls.to_host and not [name for name in WAITING if calls.made[name]], calls.made
    assert not calls.made["replication_pad3d"] and not calls.made["constant_pad_nd"], "borders are written, not padded"


# Strict float32


@pytest.mark.parametrize("card, allowed", [("a2", False), ("a3", False), ("a5", True)])
def test_strict_float32_is_refused_where_a_cards_convolution_rounds(play, card, allowed):
    checks = play(card)
    if allowed:
        check_strict(NPU)
        with checks, strict_float32(NPU):
            run("2.1", "decode", FP32)
        assert checks.checked["convolution_without_hf32"] > 50 and not checks.checked["convolution"]
        return
    series = card_rules.SERIES[card]
    with pytest.raises(ValueError, match=f"float32_strict.*cards of {series} round.*Set dtype to 'float32'"):
        check_strict(NPU)
    with checks, strict_float32(NPU), pytest.raises(ValueError, match="convolution_without_hf32 takes float16"):
        run("2.1", "decode", FP32)


def test_hf32_is_as_before_after_strict_float32():
    assert torch.npu.conv.allow_hf32 and not torch.npu.matmul.allow_hf32, "torch_npu's defaults"
    with pytest.raises(RuntimeError, match="left"), strict_float32(NPU):
        assert not torch.npu.conv.allow_hf32 and not torch.npu.matmul.allow_hf32
        raise RuntimeError("left")
    assert torch.npu.conv.allow_hf32 and not torch.npu.matmul.allow_hf32
