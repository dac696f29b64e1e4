"""Published videos: what other systems made, with which settings, and how long they took."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ascend_runtime import AccelerationSpec, ParallelSpec, SampleSpec, StepCacheSpec, VideoSize

NPU_CARDS = ("a2", "a3", "a5")  # product lines, as `devices.card` names them


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A video, and the seconds that another system published for its text, image, denoising and decoding.

    folder: the model's, in diffusers' layout.
    task: "t2v" makes it from a prompt; "i2v" also from an image that the model reads next to the noise; "ti2v" from an
        image that is the latent's first frame.
    plan: the degrees (cfg, ulysses, tp), whose product is the number of cards. fsdp: the weights are shared too.
    card: an NPU's product line, or a part of a CUDA device's name.
    differs: what the publisher did otherwise, or does not say, so that the seconds cannot be compared.
    speed_up: published, over one card with the same optimisations.
    denoising: whether the seconds are of the denoising only.
    """

    name: str
    folder: str
    task: str
    size: VideoSize
    sample: SampleSpec
    plan: tuple[int, int, int]
    fsdp: bool = False
    attention: str = "auto"
    acceleration: AccelerationSpec = AccelerationSpec()
    card: str
    seconds: float
    source: str
    differs: str = ""
    speed_up: float | None = None
    denoising: bool = False

    @property
    def parallel(self) -> ParallelSpec:
        cfg, ulysses, tp = self.plan
        degrees = {"cfg_degree": cfg, "ring_degree": 1, "ulysses_degree": ulysses, "tp_degree": tp}
        return ParallelSpec(ranks=cfg * ulysses * tp, fsdp=self.fsdp, **degrees)

    @property
    def kind(self) -> str:
        """The kind of device."""
        return "npu" if self.card in NPU_CARDS else "cuda"


def _size(width: int, height: int, num_frames: int = 81) -> VideoSize:
    return VideoSize(width=width, height=height, num_frames=num_frames)


WAN_21 = SampleSpec(steps=50, guidance_scale=5.0, shift=5.0)
T2V_A14B = SampleSpec(steps=40, guidance_scale=4.0, guidance_scale_low_noise=3.0, shift=12.0)
I2V_A14B = SampleSpec(steps=40, guidance_scale=3.5, shift=5.0)
I2V_FOUR_STEPS = SampleSpec(steps=4, guidance_scale=3.5, shift=5.0)
TI2V_5B = SampleSpec(steps=50, guidance_scale=5.0, shift=5.0)
HUNYUAN = SampleSpec(steps=50, guidance_scale=1.0, embedded_guidance=6.0, shift=7.0)

# MindIE. Its video of the single card names the fast attention, ALGO=1. Its table for several cards of Wan 2.1 marks
# operators, cache and sparse attention as on, and its speed-ups are over 560.8 s on one card, not over the 860.2 s that
# it publishes without cache.
QUICK_START = "MindIE: Ascend/MindIE-SD, docs/en/quick_start.md"
CACHED = "published with AttentionCache and sparse attention at settings that are not published; measured without both"
CARDS_14B = {(1, 1, 2): (502.8, 1.12), (2, 1, 1): (332.6, 1.69), (1, 2, 1): (327.6, 1.71), (1, 1, 4): (204.0, 2.754),
             (2, 1, 2): (175.8, 3.19), (1, 4, 1): (151.1, 3.71), (2, 2, 1): (147.9, 3.79), (1, 1, 8): (141.5, 3.96),
             (2, 1, 4): (102.9, 5.45), (1, 8, 1): (78.1, 7.18), (2, 4, 1): (76.4, 7.34)}  # fmt: skip
_wan_21 = partial(
    Workload, folder="Wan2.1-T2V-14B-Diffusers", task="t2v", size=_size(832, 480), sample=WAN_21,
    attention="laser", card="a2", source=QUICK_START,
)  # fmt: skip
MINDIE_21 = (
    _wan_21(name="t2v_14b_480p_1_card", plan=(1, 1, 1), seconds=860.2),
    *(
        _wan_21(name=f"t2v_14b_480p_cfg{cfg}_ulysses{ulysses}_tp{tp}", plan=(cfg, ulysses, tp), seconds=seconds,
                speed_up=speed_up, differs=CACHED)
        for (cfg, ulysses, tp), (seconds, speed_up) in CARDS_14B.items()
    ),
    _wan_21(name="t2v_1.3b_480p_1_card", folder="Wan2.1-T2V-1.3B-Diffusers", plan=(1, 1, 1), seconds=120.0,
            attention="auto", source="a blog post on MindIE SD, one card of 910B"),
)  # fmt: skip
# The page's commands for these figures were at first CFG 1 x Ulysses 8, later CFG 2 x Ulysses 4, with the same seconds.
_wan_22 = partial(
    Workload, plan=(1, 8, 1), fsdp=True, attention="laser", card="a2",
    source="MindIE: modelers.cn/models/MindIE/Wan2.2, section 5, ALGO=1",
)  # fmt: skip
MINDIE_22 = (
    _wan_22(name="t2v_a14b_720p_8_cards", folder="Wan2.2-T2V-A14B-Diffusers", task="t2v", size=_size(1280, 720),
            sample=T2V_A14B, seconds=435.99),
    _wan_22(name="i2v_a14b_720p_8_cards", folder="Wan2.2-I2V-A14B-Diffusers", task="i2v", size=_size(1280, 720),
            sample=I2V_A14B, seconds=436.42),
    _wan_22(name="ti2v_5b_704p_8_cards", folder="Wan2.2-TI2V-5B-Diffusers", task="ti2v", size=_size(1280, 704, 121),
            sample=TI2V_5B, seconds=72.21),
)  # fmt: skip

# cann-recipes: the first two with the training attention, the others with the inference attention.
_recipe = partial(
    Workload, folder="Wan2.2-I2V-A14B-Diffusers", task="i2v", sample=I2V_A14B, plan=(1, 8, 1), fsdp=True, card="a2",
    source="cann-recipes-infer, models/wan2.2-i2v/README.md",
)  # fmt: skip
_recipe_of_2025 = partial(_recipe, attention="fused", source="cann-recipes-infer, the same file, CANN 8.3.RC1")
CANN_RECIPES = (
    _recipe_of_2025(name="i2v_a14b_480p_recipe_of_2025", size=_size(832, 480), seconds=125.95),
    _recipe_of_2025(name="i2v_a14b_720p_recipe_of_2025", size=_size(1280, 720), seconds=430.17),
    _recipe(name="i2v_a14b_480p_61_frames_recipe", size=_size(832, 480, 61), attention="infer", seconds=102.54),
    _recipe(name="i2v_a14b_720p_recipe", size=_size(1280, 720), attention="infer", seconds=418.01),
)

# vLLM-Omni's nightly test: the mean latency of a request to its server.
_omni = partial(
    Workload, folder="Wan2.2-I2V-A14B-Diffusers", task="i2v", sample=I2V_FOUR_STEPS,
    source="vllm-omni, tests/dfx/perf/tests/test_wan22_i2v_vllm_omni.json",
)  # fmt: skip
_omni_of_two = partial(_omni, plan=(1, 2, 1), fsdp=True)
VLLM_OMNI = (
    _omni(name="i2v_a14b_480p_4_steps_1_h100", size=_size(832, 480), plan=(1, 1, 1), card="H100", seconds=27.62),
    _omni_of_two(name="i2v_a14b_480p_4_steps_2_h100", size=_size(832, 480), card="H100", seconds=18.94),
    _omni_of_two(name="i2v_a14b_720p_121_frames_4_steps_2_h100", size=_size(1280, 720, 121), card="H100",
                 seconds=104.11),
    _omni_of_two(name="i2v_a14b_480p_4_steps_2_a3", size=_size(832, 480), card="a3", seconds=65.53),
    _omni_of_two(name="i2v_a14b_720p_121_frames_4_steps_2_a3", size=_size(1280, 720, 121), card="a3", seconds=466.0),
)  # fmt: skip

_sglang = partial(Workload, folder="Wan2.2-T2V-A14B-Diffusers", task="t2v", sample=T2V_A14B)
_compiled = partial(_sglang, size=_size(1280, 720), plan=(2, 2, 1), fsdp=True,
                    source="sglang, pull request 28304, with torch.compile")  # fmt: skip
CUDA = (
    _compiled(name="t2v_a14b_720p_4_h100", card="H100", seconds=208.88),
    _compiled(name="t2v_a14b_720p_4_b200", card="B200", seconds=107.57),
    _sglang(name="t2v_a14b_480p_50_steps_1_h200", size=_size(832, 480), plan=(1, 1, 1), card="H200", seconds=264.1,
            sample=SampleSpec(steps=50, guidance_scale=5.0, shift=12.0), source="sglang, pull request 25483"),
    Workload(name="i2v_a14b_720p_8_h100", folder="Wan2.2-I2V-A14B-Diffusers", task="i2v", size=_size(1280, 720),
             sample=I2V_A14B, plan=(1, 8, 1), fsdp=True, card="H100", seconds=195.13,
             source="Wan's own code with FlashAttention 3: Morphic, morphicfilms/wan2.2_optimizations"),
)  # fmt: skip

# cann-recipes' optimised operators and VAE; the dense attention is FIA, which is "infer" here. Its 904 s on four cards
# and its ring's 949 s are of the denoising only.
RECIPE = "cann-recipes-infer, docs/models/hunyuan-video/hunyuan_video_optimization.md"
_hunyuan = partial(
    Workload, folder="HunyuanVideo", task="t2v", size=_size(1280, 720, 129), sample=HUNYUAN, plan=(1, 1, 1),
    attention="infer", card="a3", source=RECIPE,
)  # fmt: skip
_hunyuan_950 = partial(_hunyuan, card="a5")
# Ulysses on all cards, by HunyuanVideo's own code with xDiT; what the seconds include is not said. HunyuanVideo's own
# README has the same figures of H100, but for two cards, where its 934.09 s are what xDiT publishes for 960 x 960.
XDIT = "xDiT, docs/performance/hunyuanvideo.md"
HUNYUAN_CUDA = {"H100": {1: 1904.08, 2: 925.04, 4: 514.08, 8: 337.58}, "H20": {1: 6639.17, 2: 3400.55, 4: 1762.86,
                8: 940.97}}  # fmt: skip
HUNYUAN_VIDEO = (
    _hunyuan(name="hunyuan_video_720p_1_a3", seconds=3612.3),
    _hunyuan(name="hunyuan_video_720p_fbcache_1_a3", seconds=1778.28,
             acceleration=AccelerationSpec(step_cache=StepCacheSpec(method="fbcache", threshold=0.05))),
    _hunyuan(name="hunyuan_video_720p_teacache_1_a3", seconds=1830.75,
             acceleration=AccelerationSpec(step_cache=StepCacheSpec(method="teacache", threshold=0.15))),
    _hunyuan(name="hunyuan_video_720p_taylorseer_1_a3", seconds=1500.17,
             acceleration=AccelerationSpec(step_cache=StepCacheSpec(method="taylorseer", interval=4, order=3))),
    _hunyuan(name="hunyuan_video_720p_ulysses4_denoising_a3", plan=(1, 4, 1), seconds=904.0, denoising=True),
    _hunyuan(name="hunyuan_video_720p_ulysses5_a3", plan=(1, 5, 1), seconds=811.38),
    _hunyuan(name="hunyuan_video_720p_ulysses8_a3", plan=(1, 8, 1), seconds=487.68),
    _hunyuan_950(name="hunyuan_video_720p_1_a5", seconds=2580.87),
    _hunyuan_950(name="hunyuan_video_720p_ulysses8_a5", plan=(1, 8, 1), seconds=256.92),
    _hunyuan_950(name="hunyuan_video_720p_fp8_1_a5", attention="fp8", seconds=1638.55),
    _hunyuan_950(name="hunyuan_video_720p_fp8_ulysses8_a5", attention="fp8", plan=(1, 8, 1), seconds=193.96),
    *(
        _hunyuan(name=f"hunyuan_video_720p_{ranks}_{card.lower()}", plan=(1, ranks, 1), card=card, attention="auto",
                 seconds=seconds, source=XDIT)
        for card, published in HUNYUAN_CUDA.items() for ranks, seconds in published.items()
    ),
)  # fmt: skip

PUBLISHED = (*MINDIE_21, *MINDIE_22, *CANN_RECIPES, *VLLM_OMNI, *CUDA, *HUNYUAN_VIDEO)

# What cannot be a workload -> why.
UNKNOWN_WINDOW = "MindIE publishes a ratio, and not the steps at which AttentionCache starts, stores and ends"
NO_SETTINGS = "the number of cards and of dense steps is not known"
IN_MXFP8 = "linear layers are quantized to MXFP8 at loading; this pack reads MXFP8 weights from msModelSlim's folders"
OTHER_MASKS = "its mask blocks are chosen by other rules than RainFusion's"
LEFT_OUT = {
    "t2v_14b_480p, 2 cards that share only the VAE (548.8 s)": "ranks of this pack always share the denoising too",
    "t2v_14b_480p, AttentionCache 1.6 (631.7 s)": UNKNOWN_WINDOW,
    "t2v_14b_480p, AttentionCache 2.0 (541.8 s)": UNKNOWN_WINDOW,
    "t2v_14b_480p, AttentionCache 2.4 (516.9 s)": UNKNOWN_WINDOW,
    "t2v_1.3b_480p, AttentionCache (75 s)": "the published window, steps 20 to 47 of 50 by 2, saves at most 1.39 "
    "times, and 120 / 75 is 1.6",
    "t2v_1.3b_480p, 4 cards (25 s)": "whether the cache is on is not published",
    "t2v_a14b_720p, RainFusion v2: dense (532 s)": NO_SETTINGS,
    "t2v_a14b_720p, RainFusion v2: 80 % sparse (339 s)": NO_SETTINGS,
    "t2v_a14b_720p, RainFusion v2: 90 % sparse (295 s)": NO_SETTINGS,
    "hunyuan_video_720p, 730 x 1300, 8 A3 (525.75 s)": "sides must be multiples of 16",
    "hunyuan_video_720p, MXFP8, 1 950PR (2424.52 s)": IN_MXFP8,
    "hunyuan_video_720p, MXFP8, 8 950PR (244.47 s)": IN_MXFP8,
    "hunyuan_video_720p, MXFP8 and fp8 attention, 1 950PR (1571.24 s)": IN_MXFP8,
    "hunyuan_video_720p, MXFP8 and fp8 attention, 8 950PR (185.54 s)": IN_MXFP8,
    "hunyuan_video_720p, TopK, 1 A3 (1963.52 s)": OTHER_MASKS,
    "hunyuan_video_720p, SVG, 1 A3 (2167.55 s)": OTHER_MASKS,
    "hunyuan_video_1.5_480p, 1 H200 (259.4 s)": "the pack has no HunyuanVideo 1.5",
}
