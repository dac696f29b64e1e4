"""The dtypes of a generation: which computation uses which, and why. There is no autocast; every dtype is explicit.

Operators and guidance use these rules. BLOCKS, SINUSOID, NOISE and SOLVER document what the model's code and the
libraries do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import coded_error
from ..hardware import devices
from .card_rules import SERIES, supports


@dataclass(frozen=True)
class DtypeRule:
    """dtype: None for the dtype of the blocks, which the user chooses (bfloat16 on an NPU or GPU).

    npu_dtype: the dtype for an NPU's operators. reason: of the choice.
    """

    dtype: torch.dtype | None
    reason: str
    npu_dtype: torch.dtype | None = torch.float32

    def on(self, npu: bool) -> torch.dtype | None:
        return self.npu_dtype if npu else self.dtype


BLOCKS = DtypeRule(None, "Matrix products are nearly all of the work, and bfloat16 has float32's range.", None)
SINUSOID = DtypeRule(
    torch.float32,
    "bfloat16 cannot represent the fractions of timesteps up to 1000; float64, which the original uses, is slow or "
    "missing on NPUs.",
)
ROTARY = DtypeRule(
    torch.float32,
    "Angles grow with the position: in bfloat16, neighbours far from the start would have the same angle. float32 "
    "agrees with the original's complex128 to 1e-7, and NPUs lack complex128. An NPU's operator takes cosine and sine "
    "in the dtype of query and key, and computes in float32 internally: with both rounded to bfloat16, the scores of "
    "75600 tokens are off by 2.8e-3 of their standard deviation, and by 2.3e-3 with the upcast that this saves.",
    None,
)
MODULATION = DtypeRule(
    torch.float32,
    "Scale, shift and gate are sums of two terms, and apply to every token of every block. An NPU's fused operators "
    "take the sum rounded to the blocks' dtype.",
)
NORMS = DtypeRule(
    torch.float32,
    "Upcast, as in the original. An NPU's fused norms sum in float32 internally and round their output once: an upcast "
    "around them would double the memory traffic, and change only the rounding of the input.",
    None,
)
RESIDUAL = DtypeRule(
    torch.float32,
    "Gate times update, added to the residual stream. An NPU's addcmul multiplies and adds in float32 internally; "
    "upcasting around it would take four times the memory traffic.",
    None,
)
GUIDANCE = DtypeRule(torch.float32, "u + s(c - u) subtracts nearly equal predictions and amplifies the difference.")
NOISE = DtypeRule(torch.float32, "Drawn on the CPU from the seed: the same video on every device and number of ranks.")
SOLVER = DtypeRule(
    torch.float32,
    "On the CPU: a latent is small, UniPC's linear solve is tiny and slow on NPUs, and all devices get equal results.",
)
LOG_SUM_EXP = DtypeRule(torch.float32, "Merging partial attentions takes exponentials of its differences.")


# Products of float32

@contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """Convolutions and matrix products of float32 inside do not round their inputs. By default convolutions do, to 10
    of 23 bits of mantissa: HF32 on an NPU (hicann/cann-recipes-infer, ops/ascendc/examples/test_npu_hc_pre.py), TF32 on
    CUDA."""
    owners, switch = _roundings(device.type)
    before = [getattr(owner, switch) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, switch, False)
        yield
    finally:
        for owner, value in zip(owners, before):
            setattr(owner, switch, value)


def _roundings(kind: str) -> tuple[tuple[object, ...], str]:
    """(the parts of torch that may round the inputs of products, the name of their switch)"""
    if kind == "npu":
        return (torch.npu.conv, torch.npu.matmul), "allow_hf32"
    if kind == "cuda":
        return (torch.backends.cudnn, torch.backends.cuda.matmul), "allow_tf32"
    return (), ""


def check_strict(device: torch.device) -> None:
    """Raises ValueError for a card whose convolutions cannot compute in float32 without rounding."""
    card = devices.card(device)
    if device.type != "npu" or supports(card, "convolution_without_hf32", torch.float32):
        return
    raise coded_error(
        "AV-1412",
        f"dtype is 'float32_strict', but convolutions on cards of {SERIES[card]} round float32 to HF32 (10 bits of "
        "mantissa): CANN's aclnnConvolution has no other way there. Set dtype to 'float32', which uses HF32, or to "
        "'auto', which is bfloat16.",
    )
