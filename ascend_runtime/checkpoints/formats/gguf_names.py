"""llama.cpp's names of the tensors of text encoders, and its order of a Llama's rows, in terms of transformers.

Facts of convert_hf_to_gguf.py and gguf-py/gguf/tensor_mapping.py (ggml-org/llama.cpp), and of city96/ComfyUI-GGUF,
loader.py. Transformers for images and video keep their authors' names (city96/ComfyUI-GGUF, tools/convert.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..renaming import Rules, renamed

ARCHITECTURE = "general.architecture"
_T5_LAYERS = {
    "attn_q": "0.SelfAttention.q", "attn_k": "0.SelfAttention.k", "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o", "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm", "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo", "ffn_norm": "1.layer_norm",
}  # fmt: skip
_LLAMA_LAYERS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_T5: Rules = (
    (r"^token_embd\.", "shared."), (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    *((rf"^enc\.blk\.(\d+)\.{own}\.", rf"encoder.block.\1.layer.{name}.") for own, name in _T5_LAYERS.items()),
)  # fmt: skip
_LLAMA: Rules = (
    (r"^token_embd\.", "model.embed_tokens."), (r"^output_norm\.", "model.norm."), (r"^output\.", "lm_head."),
    (r"^rope_freqs\.weight$", "model.rotary_emb.inv_freq"),
    *((rf"^blk\.(\d+)\.{own}\.", rf"model.layers.\1.{name}.") for own, name in _LLAMA_LAYERS.items()),
)  # fmt: skip
LLAMA_CPP_RULES = {"t5": _T5, "t5encoder": _T5, "llama": _LLAMA}  # by architecture
# The tensors of a Llama whose rows lie in another order, and the fields with their numbers of heads.
_TURNED = {
    r"^blk\.\d+\.attn_q\.(weight|bias)$": "llama.attention.head_count",
    r"^blk\.\d+\.attn_k\.(weight|bias)$": "llama.attention.head_count_kv",
}


def name_in_network(name: str, fields: Mapping[str, object]) -> str:
    """A tensor's name as its network has it in transformers, or as its authors have it."""
    return renamed(name, LLAMA_CPP_RULES.get(fields.get(ARCHITECTURE), ()))


def heads_turned(name: str, fields: Mapping[str, object]) -> int | None:
    """The number of heads in whose rows the two halves are interleaved: a head's rows 0, d/2, 1, d/2 + 1, ... None: the
    rows lie in transformers' order. Raises ValueError if the number is missing."""
    if fields.get(ARCHITECTURE) != "llama":
        return None
    key = next((key for pattern, key in _TURNED.items() if re.match(pattern, name)), None)
    if key is None:
        return None
    heads = fields.get(key)
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{key} is missing")
    return heads
