"""RainFusion against MindIE SD's own: its order of tokens, its mask, and what its sparse_attention computes of them.

MindIE SD's Python is the real one; the operators under it are CPU stand-ins (cpu_kernels.py).
"""

import math
import random

import cpu_kernels
import mindiesd
import pytest
import torch
from ascend_runtime.hardware import devices
from ascend_runtime.acceleration import masks
from ascend_runtime.acceleration.bricks import bricks, tiles
from ascend_runtime.acceleration.rainfusion import MaskPlan, version_of
from ascend_runtime.specs import RainFusionSpec
from ascend_runtime.ops import PlainOperators, ascend_attention
from ascend_runtime.ops.ascend import AscendOperators
from ascend_runtime.specs import OperatorSpec
from mindiesd.layers.flash_attn import sparse_flash_attn_rf_v2 as rf_v2
from torch.testing import assert_close

SEED = 5
chosen = random.Random(SEED)
GRIDS = [(3, 8, 16), (4, 16, 24), (3, 8, 8), (2, 9, 31), (5, 9, 17), (3, 20, 8),  # it takes no side below 8
         *((chosen.randint(2, 6), chosen.randint(8, 21), chosen.randint(8, 21)) for _ in range(10))]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    cpu_kernels.register()


def qkv(grid, heads=2, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(3, 1, math.prod(grid), heads, head_dim, generator=generator).to(dtype).unbind()


@pytest.mark.parametrize("grid", GRIDS)
def test_tiles_are_in_its_order(grid):
    """Its rows [B, S, heads, head_dim] are numbers here."""
    numbers = torch.arange(math.prod(grid)).view(1, -1, 1, 1)
    theirs = rf_v2.rearrange_with_remaining(numbers, grid, grid, "BSND")
    assert tiles(grid).tokens.tolist() == theirs.flatten().tolist()
    back = rf_v2.inv_rearrange_with_remaining(theirs, grid, grid, "BSND")
    assert tiles(grid).undo(theirs.transpose(1, 2)).flatten().tolist() == back.flatten().tolist()


@pytest.mark.parametrize("sparsity", [0.5, 0.64, 0.9])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_mask_is_its(grid, sparsity):
    query, key, value = qkv(grid)
    *_, pooled = rf_v2.do_tensor_rearrange_pooling(query, key, value, 0, 128, grid, grid, "BSND")
    theirs = rf_v2.get_blockwise_mask(pooled, 0, sparsity, 0.25, 128, grid, grid, "BSND", return_binary=True)
    order = tiles(grid)
    ours = masks.best(order.apply(query), order.apply(key), sparsity, order.protected)
    assert torch.equal(ours, theirs.bool())


@pytest.mark.parametrize("grid", GRIDS)
def test_version_3_is_its_sparse_attention(grid):
    query, key, value = qkv(grid, dtype=torch.bfloat16)
    by_heads = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    theirs = mindiesd.sparse_attention(*by_heads, head_num=2, input_layout="BNSD", sparse_type="rf_v2",
                                       latent_shape_q=list(grid), latent_shape_k=list(grid), sparsity=0.7)  # fmt: skip
    # It pools in bfloat16, which may turn a close choice: the mask is compared above, here the rest.
    *_, pooled = rf_v2.do_tensor_rearrange_pooling(query, key, value, 0, 128, grid, grid, "BSND")
    mask = rf_v2.get_blockwise_mask(pooled, 0, 0.7, 0.25, 128, grid, grid, "BSND", return_binary=True).bool()
    plan = MaskPlan(PlainOperators().sparse_pattern(mask), torch.empty(2))
    ours = version_of(RainFusionSpec(version="v3", sparsity=0.7), grid, PlainOperators())(query, key, value, plan)
    assert_close(ours.out, theirs.transpose(1, 2), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("card", ["a2", "a5"])
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_an_npu_computes_what_a_cpu_does(monkeypatch, card, version):
    monkeypatch.setattr(devices, "card", lambda device: card)
    npu = AscendOperators(torch.device("npu", 0), OperatorSpec(), torch.bfloat16)
    for grid in GRIDS[:6]:
        inputs = [x.expand(2, -1, -1, -1) * torch.tensor([1.0, -0.5]).view(2, 1, 1, 1).bfloat16()
                  for x in qkv(grid, head_dim=64, dtype=torch.bfloat16)]  # fmt: skip
        spec = RainFusionSpec(version=version, sparsity=0.8)
        ours = version_of(spec, grid, npu)(*inputs, None)
        expected = version_of(spec, grid, PlainOperators())(*inputs, None)
        assert_close(ours.out, expected.out, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_mask_is_brought_into_the_operators_form_once(monkeypatch, version):
    """And the step that takes a plan over computes the same."""
    monkeypatch.setattr(devices, "card", lambda device: "a2")
    npu = AscendOperators(torch.device("npu", 0), OperatorSpec(), torch.bfloat16)
    made, bring = [], npu.sparse_pattern
    monkeypatch.setattr(npu, "sparse_pattern", lambda mask: (made.append(mask.shape), bring(mask))[1])
    inputs = qkv(GRIDS[1], dtype=torch.bfloat16)
    compute = version_of(RainFusionSpec(version=version, sparsity=0.8), GRIDS[1], npu)
    first = compute(*inputs, None)
    assert torch.equal(compute(*inputs, first.plan).out, first.out) and len(made) == 1


def test_the_form_of_a_mask_is_mindiesds():
    mask = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(SEED)) < 0.4
    mask[..., 0] = True
    (indices,), (counts,) = ascend_attention.chosen_blocks(mask)
    assert torch.equal(indices.long(), rf_v2.get_mask_index(mask)[0].transpose(0, 1).long())
    assert torch.equal(counts, mask[0].sum(-1).transpose(0, 1))


def test_bricks_are_its_tiles_of_two_frames():
    """Where nothing remains: a brick is the tile of one frame, and the same of the next."""
    frames, rows, columns = 5, 16, 24
    one_frame = tiles((1, rows, columns)).tokens.view(-1, 1, 64)
    both = torch.cat([one_frame, one_frame + rows * columns], 1).flatten()
    expected = torch.cat([both + rows * columns, both + 3 * rows * columns, torch.arange(rows * columns)])
    assert torch.equal(bricks((frames, rows, columns)).tokens, expected)
