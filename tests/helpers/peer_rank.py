"""A rank that attends to its chunk of a sequence by our hands and by another package's: `peer_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. FOLDER holds case.json, and query, key and value in inputs.safetensors; the
rank writes its chunk of the attention, as `ours` and `theirs`, to out-RANK.safetensors. The ranks meet in a file of
the folder, at no port.
"""

import json
from types import SimpleNamespace

import gloo_ranks
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from sequence_rank import attend


def yunchang(query, key, value, **_):
    """Ulysses of chunks [B, S/U, heads, head_dim]."""
    from yunchang import UlyssesAttention
    from yunchang.kernels import AttnType, select_flash_attn_impl

    attention = select_flash_attn_impl(AttnType.TORCH_MATH, stage="fwd-only")
    layer = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_MATH)
    # What the layer takes by itself calls flash attention even for TORCH_MATH, and no CPU has that operator.
    layer.attn_fn = lambda q, k, v, softmax_scale, causal, **_: attention(q, k, v, 0.0, softmax_scale, causal)
    return layer(query, key, value)


def xfuser(query, key, value, *, ring, ulysses):
    """USP of chunks [B, S/N, heads, head_dim]; the exchange and the merge are xfuser's, the attention is torch's."""
    from xfuser.core.distributed import init_distributed_environment, initialize_model_parallel, runtime_state
    from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
    from xfuser.model_executor.layers import usp

    def on_the_cpu(query, key, value, dropout_p, is_causal, attention_kwargs=None):
        """Its own backends give the log-sum-exp on accelerators alone."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal)

    backend = AttentionBackendType.SDPA_FLASH
    ATTENTION_FUNCTION_REGISTRY[backend] = on_the_cpu
    init_distributed_environment(rank=dist.get_rank(), world_size=dist.get_world_size(), backend="gloo", local_rank=0)
    initialize_model_parallel(sequence_parallel_degree=ring * ulysses, ring_degree=ring, ulysses_degree=ulysses,
                              backend="gloo")  # fmt: skip
    heads_first = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    settings = SimpleNamespace(use_spargeattn_head_balance=False)  # a whole engine's, which is not here
    runtime_state._RUNTIME = SimpleNamespace(fp8_comms=None, runtime_config=settings)
    return usp.USP(*heads_first, backend=backend).transpose(1, 2)


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    case = json.loads((folder / "case.json").read_text())
    degrees = {"ring": case["ring"], "ulysses": case["ulysses"]}
    inputs = load_file(folder / "inputs.safetensors")
    ours = attend(inputs, **degrees, exchange="rotate", overlap=False).unflatten(2, inputs["query"].shape[2:])
    chunks = [inputs[name].chunk(ranks, dim=1)[rank].contiguous() for name in ("query", "key", "value")]
    theirs = {"yunchang": yunchang, "xfuser": xfuser}[case["peer"]](*chunks, **degrees)
    out = {"ours": ours.chunk(ranks, dim=1)[rank].contiguous(), "theirs": theirs.contiguous()}
    save_file(out, folder / f"out-{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
