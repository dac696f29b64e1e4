"""Published calibrations of step caches for the HunyuanVideo models, and the values of their presets."""

from __future__ import annotations

from ...specs import Calibration
from ..defaults import Defaults
from .defaults import TEXT

WIDTH = 3072  # of the published transformers
UP_TO_540P = 960 * 544  # pixels of a frame up to which the magnitudes of 540p are used
# TeaCache's polynomial, highest power first, which maps the relative change of the first block's modulated input to
# that of the output (github.com/ali-vilab/TeaCache at 7c10efc, TeaCache4HunyuanVideo). It was fitted to text-to-video;
# FramePack, whose network is HunyuanVideo's for images, uses it as it is (github.com/lllyasviel/FramePack).
COEFFICIENTS = (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800, 9.61237896e-02)
# MagCache's magnitude ratios in 50 steps of text-to-video: for each step, the norm of the blocks' residual divided by
# that of the step before (github.com/Zehong-Ma/MagCache at 8715292, MagCache4HunyuanVideo).
RATIOS = {
    "540P": (
        1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632, 1.02974, 1.00984,
        1.03028, 1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726, 1.03727, 1.01502, 1.00992, 1.03371,
        0.9976, 1.02742, 1.0093, 1.01869, 1.00815, 1.01461, 1.01152, 1.03082, 1.0061, 1.02162, 1.01999, 0.99063,
        1.01186, 1.0217, 0.99947, 1.01711, 0.9904, 1.00258, 1.00878, 0.97039, 0.97686, 0.94315, 0.97728, 0.91154,
        0.86139, 0.76592,
    ),
    "720P": (
        1.0, 1.0754, 1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142, 1.03101, 1.00679,
        1.02556, 1.00908, 1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779, 1.03381, 1.01886, 1.01161, 1.02968,
        1.00544, 1.02822, 1.00689, 1.02119, 1.0105, 1.01044, 1.01572, 1.02972, 1.0094, 1.02368, 1.0226, 0.98965,
        1.01588, 1.02146, 1.0018, 1.01687, 0.99436, 1.00283, 1.01139, 0.97122, 0.98251, 0.94513, 0.97656, 0.90943,
        0.85703, 0.75456,
    ),
}  # fmt: skip
# Values of presets that others have published for HunyuanVideo; a preset's other values are those of every family.
# TeaCache: 0.15; balanced has the other published threshold, 0.1 (see COEFFICIENTS). MagCache: 0.12 with 4 and 0.24 with
# 6 steps in a row (see RATIOS); quality is half of the first. FBCache: 0.06 (github.com/chengzeyi/ParaAttention) and
# 0.1; TaylorSeer: order 3, one step in four (both github.com/hicann/cann-recipes-infer at 06656b0,
# models/hunyuan-video).
STEP_CACHE_PRESETS = {
    "fbcache": {"balanced": {"threshold": 0.06}, "fast": {"threshold": 0.1}},
    "teacache": {"fast": {"threshold": 0.15}},
    "magcache": {
        "quality": {"threshold": 0.06, "most": 2},
        "balanced": {"threshold": 0.12, "most": 4},
        "fast": {"threshold": 0.24, "most": 6},
    },
    "taylorseer": {"fast": {"order": 3}},
}


def published(own: Defaults, width: int, pixels: int) -> Calibration:
    """The published calibration. own: the model's defaults. width: of its transformer: others have its shapes, but not
    its weights. pixels: of a frame."""
    if width != WIDTH:
        return Calibration()
    size = "540P" if pixels <= UP_TO_540P else "720P"
    ratios = RATIOS[size] if own.name == TEXT.name else ()  # of the models for images there are none
    return Calibration(coefficients=COEFFICIENTS, ratios=ratios, source=f"published, of {TEXT.name} at {size}")
