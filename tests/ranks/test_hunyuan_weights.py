"""What a rank holds of HunyuanVideo's weights: slices of its blocks, and shares of all."""

import random_hunyuan
import torch
from ascend_runtime.models.hunyuan_video.family import FAMILY
from ascend_runtime.models.hunyuan_video.transformer import HunyuanVideoTransformer
from ascend_runtime.models.hunyuan_video.weights import cut_dim, kept_in_8_bits
from ascend_runtime.models.shared.quantized.replacing import linears

BY_ROWS = {"transformer_blocks": {"attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"},
           "single_transformer_blocks": {"proj_out_attn", "proj_out_mlp"}}  # fmt: skip
MODULATION = {"norm1.linear", "norm1_context.linear", "norm.linear"}


def published():
    return HunyuanVideoTransformer({})


def test_what_is_cut_of_the_published_network():
    """Of each block: what makes heads, inner widths or modulation along dim 0, what reads them along dim 1; norms of
    heads and what is outside of blocks are whole."""
    for kind, by_rows in BY_ROWS.items():
        cuts = {name.removeprefix(f"{kind}.1."): cut_dim(name) for name, _ in published().named_parameters()
                if name.startswith(f"{kind}.1.")}  # fmt: skip
        assert {name for name, dim in cuts.items() if dim == 1} == {f"{layer}.weight" for layer in by_rows}
        whole = {name for name, dim in cuts.items() if dim is None}
        norms = {name for name in cuts if "attn.norm_" in name}
        assert whole == norms | {f"{layer}.bias" for layer in by_rows} & cuts.keys() and norms
    outside = [name for name, _ in published().named_parameters() if not name.startswith(tuple(BY_ROWS))]
    assert outside and not any(cut_dim(name) is not None for name in outside)


def test_a_slice_of_eight_is_an_eighth_of_the_blocks():
    """Modulation is 27 % of them: whole, it would take 6.8 GB of bfloat16 on each rank."""
    sizes = {name: parameter.numel() for name, parameter in published().named_parameters()}
    assert 12.8e9 < sum(sizes.values()) < 12.85e9
    blocks = {name: size for name, size in sizes.items() if name.startswith(tuple(BY_ROWS))}
    cut = sum(size for name, size in blocks.items() if cut_dim(name) is not None)
    assert cut > 0.9999 * sum(blocks.values())
    modulation = sum(size for name, size in blocks.items() if any(f".{layer}." in name for layer in MODULATION))
    assert 0.27 < modulation / sum(blocks.values()) < 0.28 and 6.7e9 < 2 * modulation < 6.9e9


def test_units_are_all_that_weighs_in_the_order_of_their_use():
    """FSDP gathers a unit while the one before it computes; what is outside of units stays for a whole pass."""
    network = random_hunyuan.ours(random_hunyuan.transformer("i2v replace"))
    used = []
    for unit in network.units:
        unit.register_forward_pre_hook(lambda unit, *_: used.append(unit))
    with torch.no_grad():
        random_hunyuan.velocity(network, random_hunyuan.inputs(network.config))
    assert used == network.units
    whole = published()
    inside = {id(parameter) for unit in whole.units for parameter in unit.parameters()}
    outside = sum(parameter.numel() for parameter in whole.parameters() if id(parameter) not in inside)
    assert outside < 20e6 and not any(FAMILY.weights.replicated(name) for name, _ in whole.named_parameters())


def test_layers_in_8_bits_are_those_of_both_kinds_of_blocks():
    """All but modulation, norms, and what reads a feed-forward's inner activations."""
    layers = {name.split(".", 2)[2] for name in linears(published(), kept_in_8_bits)}
    heads = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")}
    others = {"attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff_context.net.0.proj", "proj_mlp", "proj_out_attn"}
    assert layers == heads | others
