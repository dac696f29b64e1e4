"""Has core's own loaders build networks as large as their files say, where core knows the published sizes only:
UMT5, CLIP-L, Llama 3, the VAEs of Wan 2.2 and HunyuanVideo, and the width of HunyuanVideo's pooled text.
Files of the published sizes load as before."""

import re

import comfy.ldm.wan.vae2_2
import comfy.model_detection
import comfy.sd

CLIP_HEAD_DIM, LLAMA_HEAD_DIM = 64, 128
vae_state: dict = {}  # of the VAE that is being built


def count(state, prefix: str) -> int:
    """The number of layers whose names begin with a prefix and a number."""
    found = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    return 1 + max(int(match[1]) for match in map(found.match, state) if match)


def umt5(state) -> dict:
    attention, feed_forward = (f"encoder.block.0.layer.{part}" for part in ("0.SelfAttention", "1.DenseReluDense"))
    inner, width = state[f"{attention}.q.weight"].shape
    heads = state[f"{attention}.relative_attention_bias.weight"].shape[1]
    return {"vocab_size": len(state["shared.weight"]), "d_model": width, "num_heads": heads, "d_kv": inner // heads,
            "d_ff": len(state[f"{feed_forward}.wi_0.weight"]), "num_layers": count(state, "encoder.block.")}


def clip_l(state) -> dict:
    layers = "text_model.encoder.layers."
    vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
    return {"vocab_size": vocabulary, "hidden_size": width, "num_attention_heads": max(1, width // CLIP_HEAD_DIM),
            "intermediate_size": len(state[f"{layers}0.mlp.fc1.weight"]), "num_hidden_layers": count(state, layers)}


def llama(state) -> dict:
    layers = "model.layers."
    vocabulary, width = state["model.embed_tokens.weight"].shape
    queries, keys = (len(state[f"{layers}0.self_attn.{part}_proj.weight"]) for part in "qk")
    return {"vocab_size": vocabulary, "hidden_size": width, "num_attention_heads": queries // LLAMA_HEAD_DIM,
            "num_key_value_heads": keys // LLAMA_HEAD_DIM, "num_hidden_layers": count(state, layers),
            "intermediate_size": len(state[f"{layers}0.mlp.gate_proj.weight"])}


# Core's option for a text encoder's sizes: a tensor that it has; how its sizes are read.
TEXT_ENCODERS = {
    "umt5xxl_model_config": ("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", umt5),
    "model_config": ("text_model.embeddings.token_embedding.weight", clip_l),
    "llama_model_config": ("model.layers.0.self_attn.q_proj.weight", llama),
}
own_detect, own_load = comfy.sd.detect_te_model, comfy.sd.load_text_encoder_state_dicts


def detect_te_model(state):
    return comfy.sd.TEModel.T5_XXL if TEXT_ENCODERS["umt5xxl_model_config"][0] in state else own_detect(state)


def load_text_encoder_state_dicts(state_dicts=(), *arguments, model_options=None, **others):
    options = dict(model_options or {})
    for state in state_dicts:
        for name, (tensor, read) in TEXT_ENCODERS.items():
            if tensor in state:
                options[name] = read(state)
    return own_load(state_dicts, *arguments, model_options=options, **others)


own_init = comfy.sd.VAE.__init__


def init(self, sd=None, *arguments, **others):
    vae_state.clear()
    vae_state.update({name: tuple(x.shape) for name, x in (sd or {}).items()})
    own_init(self, sd, *arguments, **others)


class WanVAE(comfy.ldm.wan.vae2_2.WanVAE):
    """Wan 2.2's."""

    def __init__(self, **config):
        sizes = {"dim": vae_state["encoder.conv1.weight"][0], "dec_dim": vae_state["decoder.head.0.gamma"][0]}
        super().__init__(**{**config, **sizes})


def autoencoder(ddconfig, **others):
    """Core's AutoencoderKL; of HunyuanVideo if its convolutions are in three dimensions."""
    if ddconfig.get("conv3d"):
        levels = range(count(vae_state, "encoder.down."))
        base = vae_state["encoder.conv_in.conv.weight"][0]
        widths = [vae_state[f"encoder.down.{level}.block.0.conv1.conv.weight"][0] for level in levels]
        ddconfig = {**ddconfig, "ch": base, "ch_mult": [width // base for width in widths],
                    "num_res_blocks": count(vae_state, "encoder.down.0.block.")}
    return own_autoencoder(ddconfig=ddconfig, **others)


own_autoencoder = comfy.sd.AutoencoderKL
own_unet_config = comfy.model_detection.detect_unet_config


def detect_unet_config(state_dict, key_prefix, *arguments, **others):
    config = own_unet_config(state_dict, key_prefix, *arguments, **others)
    pooled = state_dict.get(f"{key_prefix}vector_in.in_layer.weight")
    if config and config.get("vec_in_dim") and pooled is not None:
        config["vec_in_dim"] = pooled.shape[1]
    return config


comfy.sd.detect_te_model, comfy.sd.load_text_encoder_state_dicts = detect_te_model, load_text_encoder_state_dicts
comfy.sd.VAE.__init__, comfy.sd.AutoencoderKL, comfy.ldm.wan.vae2_2.WanVAE = init, autoencoder, WanVAE
comfy.model_detection.detect_unet_config = detect_unet_config
