"""Block-sparse attention in torch: mask blocks of 128 queries by 128 keys are computed or skipped.

Each function takes query, key and value [B, heads, S, head_dim] and a mask [B, heads, blocks, blocks] (query blocks by
key blocks, at least one true in each row), and returns [B, heads, S, head_dim].
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens; MindIE SD's operators support no other size


def blocks_of(length: int) -> int:
    """The number of mask blocks of a sequence; the last one may be shorter."""
    return -(-length // BLOCK)


def gathered(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """For a CPU: gathers the keys and values of each query block, and computes only their products, in fp32."""
    out = torch.empty_like(query)
    for video in range(query.shape[0]):
        for head in range(query.shape[1]):
            _one_head(*(x[video, head] for x in (query, key, value, mask, out)))
    return out


def _one_head(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, out: Tensor) -> None:
    """query, key, value, out [S, head_dim]; mask [blocks, blocks]. Query blocks that attend to all keys need no gather.

    Buffers are allocated once: new ones of this size would cost page faults at each use.
    """
    blocks, length = len(mask), len(query)
    dense = mask.all(1)
    rows = dense.repeat_interleave(BLOCK)[:length]
    if dense.any():
        attending = (x[None, None].float() for x in (query[rows], key, value))
        out[rows] = F.scaled_dot_product_attention(*attending)[0, 0].type_as(out)
    query = query.float() * query.shape[-1] ** -0.5
    keys, values = (F.pad(x.float(), (0, 0, 0, blocks * BLOCK - length)).view(blocks, -1) for x in (key, value))
    most = int(mask.sum(1)[~dense].max()) if not dense.all() else 0
    chosen_blocks, scores = query.new_empty(most, keys.shape[1]), query.new_empty(BLOCK * most * BLOCK)
    for number, (own, kept) in enumerate(zip(query.split(BLOCK), mask)):
        if dense[number]:
            continue
        chosen = kept.nonzero().flatten()
        tokens = len(chosen) * BLOCK - (blocks * BLOCK - length if kept[-1] else 0)
        block, weights = chosen_blocks[: len(chosen)], scores[: len(own) * tokens].view(len(own), tokens)
        some = block.view(-1, query.shape[-1])[:tokens]
        torch.index_select(keys, 0, chosen, out=block)
        torch.mm(own, some.t(), out=weights)
        torch.softmax(weights, -1, out=weights)
        torch.index_select(values, 0, chosen, out=block)
        out[number * BLOCK : number * BLOCK + len(own)] = weights @ some


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, attend: Callable[..., Tensor] | None = None
) -> Tensor:
    """For CUDA: FlexAttention, which skips masked blocks; compiled at the first use of a shape.

    attend: flex_attention itself, to run it without compilation.
    """

    # Imported here, as it takes a tenth of a second that only CUDA needs.
    from torch.nn.attention.flex_attention import BlockMask

    def within(video: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[video, head, q // BLOCK, k // BLOCK]

    length = query.shape[2]
    counts = mask.sum(-1, dtype=torch.int32)
    columns = mask.int().sort(dim=-1, descending=True, stable=True).indices.int()  # the chosen ones first
    # Every mask block is computed completely or skipped, so no block is partially masked.
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), columns, counts, columns, BLOCK, within, seq_lengths=(length, length)
    )
    return (attend or _compiled_flex())(query, key, value, block_mask=block_mask)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
