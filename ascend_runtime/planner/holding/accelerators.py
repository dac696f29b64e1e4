"""What accelerators keep on a rank, counted in outputs of a block [B, S, D] of this rank's tokens."""

from __future__ import annotations

from ...specs import AccelerationSpec, StepCacheSpec, Window

REORDERED = 4  # query, key and value in RainFusion's order, and its result


def outputs_kept(spec: AccelerationSpec, blocks: int, branches: int) -> int:
    """The block outputs that a job's accelerators hold while a pass computes. blocks: of the network. branches: of
    guidance, that this rank computes. The caches of one expert are freed before those of the next are filled."""
    kept = REORDERED if spec.rainfusion is not None else 0
    if spec.attention_cache is not None:
        return kept + attentions_kept(spec.attention_cache, blocks, branches)
    if spec.block_cache is not None:
        return kept + residuals_kept(spec.block_cache, blocks, branches)
    return kept + (expansions_kept(spec.step_cache, branches) if spec.step_cache is not None else 0)


def attentions_kept(window: Window, blocks: int, branches: int) -> int:
    """AttentionCache keeps each cached block's attention of each branch."""
    return len(window.blocks(blocks)) * branches


def residuals_kept(window: Window, blocks: int, branches: int) -> int:
    """The block cache keeps what its blocks added. While they compute, it has dropped what they added before, and keeps
    their input; while the blocks behind them compute, it keeps those blocks' input."""
    cached = window.blocks(blocks)
    return branches + 1 if cached.stop < blocks else branches - 1 + bool(cached.start)


def expansions_kept(spec: StepCacheSpec, branches: int) -> int:
    """A step cache keeps what all blocks added and, for TaylorSeer, its differences up to `order`.

    Rules that look at tensors keep the one that they compare with; the first-block cache also keeps its block's output
    until the last block has computed.
    """
    order = spec.order if spec.method == "taylorseer" else 0
    looked_at = {"fbcache": 2, "teacache": 1}.get(spec.method, 0)
    return branches * (order + 1) + looked_at
