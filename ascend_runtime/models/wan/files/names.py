"""Maps the parameter names of all systems that write Wan checkpoints to those of diffusers and transformers."""

from __future__ import annotations

import re

from ....checkpoints.renaming import MODELSLIM, PREFIXES, TOKENIZER_MODEL, Rules, inverted, renamed

# The transformer. Prefixes of ComfyUI and others are removed; MindSpeed-MM's names
# (checkpoint/sora_model/wan_converter.py) become the original's (Wan-Video/Wan2.2, wan/modules/model.py), and these
# become diffusers'. No pattern matches diffusers' own names.
MINDSPEED_RULES: Rules = (
    (r"(self|cross)_attn\.proj_(q|k|v)\.", r"\1_attn.\2."),
    (r"(self|cross)_attn\.proj_out\.", r"\1_attn.o."),
    (r"(self|cross)_attn\.(q|k)_norm", r"\1_attn.norm_\2"),
    (r"^text_embedding\.linear_1\.", "text_embedding.0."),
    (r"^text_embedding\.linear_2\.", "text_embedding.2."),
)
ORIGINAL_RULES: Rules = (
    (r"self_attn\.norm_(q|k)", r"attn1.norm_\1"),
    (r"self_attn\.(q|k|v)\.", r"attn1.to_\1."),
    (r"self_attn\.o\.", "attn1.to_out.0."),
    (r"cross_attn\.norm_k_img", "attn2.norm_added_k"),
    (r"cross_attn\.(k|v)_img\.", r"attn2.add_\1_proj."),
    (r"cross_attn\.norm_(q|k)", r"attn2.norm_\1"),
    (r"cross_attn\.(q|k|v)\.", r"attn2.to_\1."),
    (r"cross_attn\.o\.", "attn2.to_out.0."),
    (r"ffn\.0\.", "ffn.net.0.proj."),
    (r"ffn\.2\.", "ffn.net.2."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
)

TRANSFORMER_RULES: Rules = (*MODELSLIM, *PREFIXES, *MINDSPEED_RULES, *ORIGINAL_RULES)

# UMT5's encoder: from the original's names (wan/modules/t5.py) to those of transformers' UMT5EncoderModel.
TEXT_ENCODER_RULES: Rules = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.", "encoder.block."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
)

# The VAEs of the original (wan/modules/vae2_1.py, vae2_2.py). The first numbers layers and resamplers in one list: 2
# layers and a downsampler for each block of the encoder, 3 layers and an upsampler in the decoder. The second nests
# them in blocks.
VAE_RULES: Rules = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."),
    (r"coder\.head\.2\.", "coder.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.downsamples\.(\d+)\.downsamples\.2\.", r".down_blocks.\1.downsampler."),
    (r"\.downsamples\.(\d+)\.downsamples\.", r".down_blocks.\1.resnets."),
    (r"\.upsamples\.(\d+)\.upsamples\.3\.", r".up_blocks.\1.upsampler."),
    (r"\.upsamples\.(\d+)\.upsamples\.", r".up_blocks.\1.resnets."),
    (r"\.downsamples\.", ".down_blocks."),
)
UPSAMPLES = re.compile(r"^decoder\.upsamples\.(\d+)\.")


def to_umt5_name(name: str) -> str | None:
    """transformers' name of a text encoder's parameter; None: the tensor is not a parameter."""
    return None if name == TOKENIZER_MODEL else renamed(name, TEXT_ENCODER_RULES)


def to_vae_name(name: str) -> str:
    """diffusers' name of a VAE's parameter."""

    def up_block(number: re.Match) -> str:
        block, layer = divmod(int(number[1]), 4)
        return f"decoder.up_blocks.{block}." + (f"resnets.{layer}." if layer < 3 else "upsamplers.0.")

    return UPSAMPLES.sub(up_block, renamed(name, VAE_RULES))


def to_diffusers_name(name: str) -> str | None:
    """diffusers' name of a transformer's parameter, from its name in any system; None: the tensor is not a
    parameter."""
    if name.endswith("._extra_state"):  # metadata of Megatron's layers
        return None
    return renamed(name, TRANSFORMER_RULES)


def to_mindspeed_name(name: str) -> str:
    """MindSpeed-MM's name of a transformer's parameter, from diffusers'."""
    return renamed(name, TO_MINDSPEED_RULES)


def to_original_name(name: str) -> str:
    """The original's name of a transformer's parameter, which ComfyUI uses, from diffusers'."""
    return renamed(name, TO_ORIGINAL_RULES)


TO_ORIGINAL_RULES = inverted(ORIGINAL_RULES)
TO_MINDSPEED_RULES = inverted((*MINDSPEED_RULES, *ORIGINAL_RULES))
