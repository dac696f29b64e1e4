"""The dtypes of a generation, as data: what is computed in which, and why. No autocast: every dtype is written out.

Operators and guidance take theirs from here. BLOCKS, SINUSOID, NOISE and SOLVER say why what the model's own code and
the libraries' do is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """dtype: None is that of the blocks, which the user chooses (bfloat16 on an NPU or GPU).

    npu_dtype: where an NPU's operators differ, else the same. reason: why it is so.
    """

    dtype: torch.dtype | None
    reason: str
    npu_dtype: torch.dtype | None = torch.float32

    def on(self, npu: bool) -> torch.dtype | None:
        return self.npu_dtype if npu else self.dtype


BLOCKS = Rule(None, "Matrix products are nearly all of the work, and bfloat16 has float32's range.", None)
SINUSOID = Rule(
    torch.float32,
    "Timesteps up to 1000 have lost their fraction in bfloat16; float64, which the original takes, NPUs compute slowly "
    "or not at all.",
)
ROTARY = Rule(
    torch.float32,
    "Angles grow with the position: in bfloat16 neighbours far from the start would share one. float32 keeps the "
    "original's complex128 to 1e-7, and NPUs have no complex128.",
)
MODULATION = Rule(
    torch.float32,
    "Scale, shift and gate are sums of two parts and multiply every token of every block. An NPU's fused operators "
    "take the sum rounded to the blocks' dtype.",
)
NORMS = Rule(
    torch.float32,
    "Upcast, as the original does. An NPU's fused norms sum in float32 inside and round their output once: an upcast "
    "around them would double the bytes moved and change only the rounding of the input.",
    None,
)
RESIDUAL = Rule(
    torch.float32,
    "Gate times update, added to the stream. An NPU's addcmul multiplies and adds in float32 inside; upcasting around "
    "it moves four times the bytes.",
    None,
)
GUIDANCE = Rule(torch.float32, "u + s(c - u) subtracts two nearly equal predictions and multiplies what is left.")
NOISE = Rule(torch.float32, "Drawn on the CPU from the seed: the same video on every device and number of ranks.")
SOLVER = Rule(
    torch.float32,
    "On the CPU: a latent is small, UniPC's linear solve tiny and ill-suited to NPUs, and the result the same for all.",
)
LOG_SUM_EXP = Rule(torch.float32, "Partial attentions are merged by exponentials of differences of it.")


WIDER = (
    "If the checkpoint is sound, the dtype is too narrow: try dtype bfloat16 instead of float16, or float32."
)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises ValueError for numbers that a dtype could not hold, with what cures it."""
    if not is_finite(tensor):
        raise not_finite(what)


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all values are numbers, in `dtype` too where one is given: the least and the greatest show it, as NaN is
    both."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    return all(torch.isfinite(extreme.to(dtype or tensor.dtype)) for extreme in torch.aminmax(tensor))


def not_finite(what: str, cure: str = WIDER) -> ValueError:
    return ValueError(f"{what} has NaN or infinite values. {cure}")
