"""GGUF files of random weights, as city96's tools and llama.cpp write them, and their twins in .safetensors."""

import itertools
import math
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

# Types that the gguf package quantizes, and those for which blocks are made at random.
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
DRAWN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
NUMBERS = ("F32", "F16", "BF16")
TYPES = (*NUMBERS, *QUANTIZED, *DRAWN)
# Where a block's fp16 scales begin.
SCALES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}  # fmt: skip


def type_named(kind):
    return gguf.GGMLQuantizationType[kind]


def random_blocks(kind, rows, columns, generator, deviation=1.0):
    """Blocks uint8 [rows, bytes] of numbers with about this standard deviation, and a mean of 0."""
    values, nbytes = gguf.GGML_QUANT_SIZES[type_named(kind)]
    blocks = generator.integers(0, 256, (rows * columns // values, nbytes), dtype=np.uint8)
    signs = generator.choice([-1, 1], (len(blocks), 1))

    def dequantized(scale):
        for begin in SCALES[kind]:
            drawn = scale * signs * generator.uniform(0.5, 1, (len(blocks), 1))
            blocks[:, begin : begin + 2] = drawn.astype(np.float16).view(np.uint8)
        return gguf.dequantize(blocks, type_named(kind))

    dequantized(deviation * 0.01 / dequantized(0.01).std())
    return blocks.reshape(rows, -1)


def encoded(tensor, kind, generator):
    """A weight's numbers in this type: quantized, or other ones of the same variance."""
    values = np.ascontiguousarray(tensor.float().numpy())
    if kind in DRAWN:
        return random_blocks(kind, *values.shape, generator, values.std())
    return gguf.quants.quantize(values, type_named(kind))


def write(file: Path, state, kind_of, seed=0, architecture="wan", fields=lambda writer: None, matrices=()) -> Path:
    """A file of these tensors, and its twin in fp32 next to it, whose path it returns.

    kind_of: the type of a tensor, by its name and shape. fields: adds more to the header. matrices: tensors that are
    stored as matrices with 256 columns.
    """
    generator, twin = np.random.default_rng(seed), {}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    fields(writer)
    for name, tensor in state.items():
        shape, kind = tuple(tensor.shape), kind_of(name, tuple(tensor.shape))
        if name in matrices:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
            tensor = tensor.reshape(-1, 256)
        data = encoded(tensor, kind, generator)
        writer.add_tensor(name, data, raw_dtype=type_named(kind))
        made = np.ascontiguousarray(gguf.dequantize(np.ascontiguousarray(data), type_named(kind)))
        twin[name] = torch.from_numpy(made).reshape(shape).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    other = file.with_suffix(".safetensors")
    save_file(twin, other)
    return other


def as_city96(kind):
    """Which type his tools give a transformer's tensors: matrices of some size are quantized."""
    def of(name, shape):
        return kind if len(shape) == 2 and math.prod(shape) > 1024 and "modulation" not in name else "F32"

    return of


def mixed():
    """As `as_city96`, with all types in turn."""
    kinds = itertools.cycle(TYPES)

    def of(name, shape):
        return next(kinds) if as_city96("")(name, shape) == "" else "F32"

    return of


# The names of llama.cpp for those of transformers.
T5_NAMES = {
    "0.SelfAttention.q": "attn_q", "0.SelfAttention.k": "attn_k", "0.SelfAttention.v": "attn_v",
    "0.SelfAttention.o": "attn_o", "0.SelfAttention.relative_attention_bias": "attn_rel_b", "0.layer_norm": "attn_norm",
    "1.DenseReluDense.wi_0": "ffn_gate", "1.DenseReluDense.wi_1": "ffn_up", "1.DenseReluDense.wo": "ffn_down",
    "1.layer_norm": "ffn_norm",
}  # fmt: skip
LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def as_llama_cpp(name, architecture):
    """llama.cpp's name of a parameter of transformers' UMT5EncoderModel or LlamaModel."""
    outside = {"shared.": "token_embd.", "encoder.final_layer_norm.": "enc.output_norm.", "encoder.block.": "enc.blk.",
               ".layer.": "."} if architecture == "t5" else {
        "embed_tokens.": "token_embd.", "norm.": "output_norm.", "layers.": "blk."}  # fmt: skip
    for theirs, own in (outside | (T5_NAMES if architecture == "t5" else {})).items():
        name = name.replace(theirs, own) if architecture == "t5" else re.sub(rf"^{re.escape(theirs)}", own, name)
    for theirs, own in LLAMA_NAMES.items() if architecture == "llama" else ():
        name = name.replace(f".{theirs}.", f".{own}.")
    return name


def turned(weight, heads):
    """A Llama's query or key as llama.cpp orders its rows: the two halves of each head are interleaved."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def t5_fields(model):
    """Writes of a sentencepiece model what llama.cpp's conversion does."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    normalizer = proto.normalizer_spec

    def fields(writer):
        writer.add_tokenizer_model("t5")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([one.piece.encode() for one in proto.pieces])
        writer.add_token_scores([one.score for one in proto.pieces])
        writer.add_token_types([one.type for one in proto.pieces])
        writer.add_add_space_prefix(normalizer.add_dummy_prefix)
        writer.add_remove_extra_whitespaces(normalizer.remove_extra_whitespaces)
        writer.add_precompiled_charsmap(normalizer.precompiled_charsmap)
        for add, number in ((writer.add_unk_token_id, 2), (writer.add_eos_token_id, 1), (writer.add_pad_token_id, 0)):
            add(number)

    return fields
