"""Writes small random weights in the forms in which other systems publish and train them, by their own names.

The names of the original are written out in random_wan; those of MindSpeed-MM are made here from them, by the table in
its converter (checkpoint/sora_model/wan_converter.py).
"""

import io
import json
import re

import sentencepiece
import torch
import torch.distributed.checkpoint as dcp
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors import safe_open
from safetensors.torch import save_file

FP8 = torch.float8_e4m3fn
MINDSPEED = (
    (r"attn\.(q|k|v)\.", r"attn.proj_\1."), (r"attn\.o\.", "attn.proj_out."), (r"attn\.norm_(q|k)\.", r"attn.\1_norm."),
    (r"cross_attn\.norm_k_img", "cross_attn.k_norm_img"),
    (r"text_embedding\.0", "text_embedding.linear_1"), (r"text_embedding\.2", "text_embedding.linear_2"),
)  # fmt: skip


def diffusers_transformer(tensors, head_dim=128):
    """diffusers' network of tensors with the original's names, through diffusers' own conversion."""
    dim, ffn = tensors["patch_embedding.weight"].shape[0], tensors["blocks.0.ffn.0.weight"].shape[0]
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    network = WanTransformer3DModel(
        num_attention_heads=dim // head_dim, attention_head_dim=head_dim, ffn_dim=ffn, num_layers=layers
    )
    network.load_state_dict(convert_wan_transformer_to_diffusers({k: x.float() for k, x in tensors.items()}))
    return network.eval()


def mindspeed_names(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in MINDSPEED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


# Folders of a transformer. Each function writes tensors with the original's names.


def original_folder(folder, tensors, heads=2):
    """Two shards and the original's config.json."""
    folder.mkdir(parents=True)
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"_class_name": "WanModel", "dim": 128 * heads, "num_heads": heads, "model_type": "t2v"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Arguments:
    """As a training system keeps beside its weights; to be read by nobody."""

    def __init__(self):
        self.lr = 1e-5

    def __setstate__(self, _):
        raise AssertionError("code of a checkpoint was run")


def mindspeed_release(folder, tensors, layers_of_stages=(2,)):
    (folder / "release").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    first = 0
    for stage, layers in enumerate(layers_of_stages):
        own, last = {}, stage == len(layers_of_stages) - 1
        for name, tensor in mindspeed_names(tensors).items():
            if block := re.match(r"blocks\.(\d+)\.(.*)", name):
                if first <= int(block[1]) < first + layers:
                    own[f"blocks.{int(block[1]) - first}.{block[2]}"] = tensor
            elif last if name.startswith("head.") else stage == 0:
                own[name] = tensor
        first += layers
        rank = "mp_rank_00" if len(layers_of_stages) == 1 else f"mp_rank_00_{stage:03d}"
        (folder / "release" / rank).mkdir()
        state = {"model": own, "args": Arguments(), "optimizer": {"exp_avg": torch.zeros(3)}, "iteration": 7}
        torch.save(state, folder / "release" / rank / "model_optim_rng.pt")
    return folder


def mindspeed_distributed(folder, tensors):
    """torch's distributed checkpoint of iteration 1000, in which an older one is left."""
    (folder / "iter_0000500").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1000")
    state = {"model": mindspeed_names(tensors), "optimizer": {"exp_avg": torch.zeros(3)}, "iteration": 1000}
    dcp.save(state, checkpoint_id=folder / "iter_0001000", no_dist=True)
    return folder


# 8 bits


def in_8_bits(tensors, dtype=FP8):
    """(8-bit weights of the layers' matrices and all other tensors, their scales by layer)."""
    kept, scales = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight"):
            scales[name.removesuffix(".weight")] = scale = tensor.abs().max() / torch.finfo(dtype).max
            tensor = (tensor / scale).to(dtype)
        kept[name] = tensor
    return kept, scales


def dequantized(kept, scales):
    """What the weights are worth."""
    return {name: tensor.float() * scales.get(name.removesuffix(".weight"), torch.tensor(1.0))
            for name, tensor in kept.items()}  # fmt: skip


def save_old_mark(file, kept, scales, prefix=""):
    tensors = kept | {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    tensors |= {f"{layer}.scale_input": torch.ones(()) for layer in scales} | {"scaled_fp8": torch.empty(0, dtype=FP8)}
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, file)


def save_new_mark(file, kept, scales):
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    tensors = kept | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    mark = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(tensors, file, metadata={"_quantization_metadata": mark})


def header_of(file):
    """What a .safetensors file says of itself."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def save_layer_marks(file, kept, scales):
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    tensors = kept | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    tensors |= {f"{layer}.input_scale": torch.ones(()) for layer in scales}
    save_file(tensors | {f"{layer}.comfy_quant": mark.clone() for layer in scales}, file)


# Text encoders and VAEs, by the original's names of what transformers' and diffusers' networks hold


def original_umt5(network):
    """The state of a UMT5EncoderModel by the names of the original (wan/modules/t5.py)."""
    state, renamed = network.state_dict(), {}
    for block in range(network.config.num_layers):
        ours, theirs = f"encoder.block.{block}.layer", f"blocks.{block}"
        for part in "qkvo":
            renamed[f"{theirs}.attn.{part}.weight"] = state[f"{ours}.0.SelfAttention.{part}.weight"]
        bias = state[f"{ours}.0.SelfAttention.relative_attention_bias.weight"]
        renamed[f"{theirs}.pos_embedding.embedding.weight"] = bias
        for number in (0, 1):
            renamed[f"{theirs}.norm{number + 1}.weight"] = state[f"{ours}.{number}.layer_norm.weight"]
        for name, part in {"gate.0": "wi_0", "fc1": "wi_1", "fc2": "wo"}.items():
            renamed[f"{theirs}.ffn.{name}.weight"] = state[f"{ours}.1.DenseReluDense.{part}.weight"]
    renamed["token_embedding.weight"] = state["shared.weight"]
    renamed["norm.weight"] = state["encoder.final_layer_norm.weight"]
    assert len(renamed) == len(state) - 1, "one name is there twice"
    return {name: tensor.clone() for name, tensor in renamed.items()}


def comfyui_umt5(network, tokenizer, dtype=torch.float32):
    """The state of a UMT5EncoderModel as ComfyUI's files have it: the embedding once, the tokenizer as a tensor."""
    state = {name: x.to(dtype) for name, x in network.state_dict().items() if name != "encoder.embed_tokens.weight"}
    return state | {"spiece_model": torch.tensor(list(tokenizer), dtype=torch.uint8)}


def sentencepiece_model():
    """A sentencepiece model of 36 pieces, numbered as T5's are, as bytes."""
    model = io.BytesIO()
    words = "red green blue yellow circle square moving left right up down on a the background".split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{a} {b} {c}" for a in words for b in words for c in words[:4]]), model_writer=model,
        vocab_size=36, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
            "shortcut": "conv_shortcut"}  # fmt: skip


def original_vae(vae):
    """The state of an AutoencoderKLWan by the names of the original (wan/modules/vae2_1.py, vae2_2.py).

    Walks through the original's order of layers, and takes from diffusers' what has that place there.
    """
    state, renamed = vae.state_dict(), {}
    nested = vae.config.is_residual

    def take(theirs, ours):
        found = {name for name in state if name.startswith(f"{ours}.")}
        for name in found:
            renamed[f"{theirs}{name.removeprefix(ours)}"] = state[name]
        return bool(found)

    def layer(theirs, ours):
        return sum([take(f"{theirs}.{name}", f"{ours}.{part}") for name, part in RESIDUAL.items()]) > 0

    def resample(theirs, ours):
        take(f"{theirs}.resample.1", f"{ours}.resample.1")
        take(f"{theirs}.time_conv", f"{ours}.time_conv")

    take("conv1", "quant_conv"), take("conv2", "post_quant_conv")
    for side in ("encoder", "decoder"):
        take(f"{side}.conv1", f"{side}.conv_in")
        take(f"{side}.head.0", f"{side}.norm_out"), take(f"{side}.head.2", f"{side}.conv_out")
        layer(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        take(f"{side}.middle.1", f"{side}.mid_block.attentions.0")
        layer(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
    number = {"encoder": 0, "decoder": 0}
    sides = (("encoder", "downsamples", "down_blocks", 2), ("decoder", "upsamples", "up_blocks", 3))
    for side, steps, blocks, layers in sides:
        flat = side == "encoder" and not nested
        for block in range(4):
            for index in range(layers + 1):
                place, last = number[side], index == layers
                theirs = f"{side}.{steps}.{block}.{steps}.{index}" if nested else f"{side}.{steps}.{place}"
                ours = f"{side}.{blocks}.{block}"
                if flat:
                    ours = f"{side}.{blocks}.{place}"
                elif not last:
                    ours += f".resnets.{index}"
                else:
                    ours += (".downsampler" if side == "encoder" else ".upsampler") if nested else ".upsamplers.0"
                (resample if last else layer)(theirs, ours)
                number[side] += 1
    assert len(renamed) == len(state), set(state) - set(renamed)
    return {name: tensor.clone() for name, tensor in renamed.items()}


def prefixed(file, tensors):
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}, file)


WRITERS = {
    "one .safetensors": lambda path, tensors: save_file(tensors, path),
    "one .safetensors with ComfyUI's prefix": prefixed,
    "the original's folder": original_folder,
    "a .pth": lambda path, tensors: torch.save(tensors, path),
    "MindSpeed-MM, one stage": lambda path, tensors: mindspeed_release(path, tensors, (3,)),
    "MindSpeed-MM, two stages": lambda path, tensors: mindspeed_release(path, tensors, (1, 2)),
    "MindSpeed-MM, distributed": mindspeed_distributed,
}


def plain_8_bits(dtype):
    def write(file, tensors):
        kept = {name: x.to(dtype) if x.ndim == 2 else x for name, x in tensors.items()}
        save_file(kept, file)
        return kept

    return write


def scaled(save):
    def write(file, tensors):
        kept, scales = in_8_bits(tensors)
        save(file, kept, scales)
        return dequantized(kept, scales)

    return write


IN_8_BITS = {
    "float8_e4m3fn": plain_8_bits(torch.float8_e4m3fn),
    "float8_e5m2": plain_8_bits(torch.float8_e5m2),
    "fp8, older mark": scaled(save_old_mark),
    "fp8, older mark, prefix": scaled(lambda *a: save_old_mark(*a, prefix="model.diffusion_model.")),
    "fp8, newer mark": scaled(save_new_mark),
    "fp8, a mark a layer": scaled(save_layer_marks),
}
