"""The Toy family: a whole family of video models outside of the pack, small, for the tests.

Unlike Wan in what a family may decide: its text stands behind the video's tokens in one sequence, in blocks of two
kinds; a second text encoder makes a pooled vector, which joins the timestep; its VAE has replicated borders and norms
over the whole video, so that it does not stream; its files have fused layers. `files.py` writes models of it.
"""

from __future__ import annotations

import re

from ascend_runtime.checkpoints.fused import Target, halves_exchanged, in_proportion
from ascend_runtime.models.cost import BlockWork, SlicedSums, Work
from ascend_runtime.models.defaults import Defaults
from ascend_runtime.models.family import TEXT_ENCODER, TRANSFORMER, VAE, Family, LoraNames, Part, WeightRules
from ascend_runtime.models.latent_format import LatentFormat
from ascend_runtime.models.shapes import count
from ascend_runtime.specs import VaeForm

TEXT_ENCODER_2 = "text_encoder_2"
CHANNELS, SPATIAL, TEMPORAL = 16, 8, 4  # of latents, and what one stands for
HEAD_DIM, PATCH = 8, 2
DOUBLE, SINGLE = "double_blocks.", "single_blocks."
MEAN, STD = tuple(0.1 * c - 0.7 for c in range(CHANNELS)), tuple(0.5 + 0.05 * c for c in range(CHANNELS))
RGB = tuple((0.1, -0.05 * c / CHANNELS, 0.02) for c in range(CHANNELS))

# The file form's names and the family's own. What is fused comes apart by `split`, which sees these own names.
RENAMED = (
    (r"^img_in\.", "patch_embedding."),
    (r"^(time|vector|txt)_in\.", r"condition_embedder.\1."),
    (r"^final\.mod\.", "norm_out.exchanged."),
    (r"^final\.linear\.", "proj_out."),
    (r"\.img_(\w+)\.", r".video.\1."),
    (r"\.txt_(\w+)\.", r".text.\1."),
)
FUSED = {"qkv": {"to_q": 1, "to_k": 1, "to_v": 1}, "linear1": {"to_q": 1, "to_k": 1, "to_v": 1, "widen": 2}}


def own_name(name):
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def split(name, shape):
    """Which parameters a tensor of a file holds: a fused layer's, or a modulation's whose halves are exchanged."""
    owner, _, kind = name.rpartition(".")
    owner, _, layer = owner.rpartition(".")
    if layer in FUSED:
        return tuple(Target(f"{owner}.{one.name}.{kind}", one.rows) for one in in_proportion(FUSED[layer], shape))
    return halves_exchanged(f"{owner}.linear.{kind}", shape) if layer == "exchanged" else None


def transformer_config(shapes):
    width, channels, *patch = shapes["patch_embedding.weight"]
    return {
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // PATCH**2,
        "patch_size": tuple(patch),
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "num_layers": count(shapes, DOUBLE),
        "num_single_layers": count(shapes, SINGLE),
        "text_dim": shapes["condition_embedder.txt.weight"][1],
        "pooled_dim": shapes["condition_embedder.vector.weight"][1],
    }


def vae_config(shapes):
    return {"base_dim": shapes["decoder.conv_in.weight"][0], "z_dim": shapes["decoder.conv_in.weight"][1]}


def words_config(shapes):
    vocabulary, width = shapes["words.weight"]
    return {"vocab_size": vocabulary, "width": width, "num_layers": count(shapes, "layers.")}


def pooled_config(shapes):
    vocabulary, width = shapes["pieces.weight"]
    return {"vocab_size": vocabulary, "width": width, "pooled_dim": shapes["projection.weight"][0]}


PARTS = {
    TRANSFORMER: Part(
        what="Toy transformer",
        published="nothing: tests write it",
        class_name=("_class_name", "ToyTransformer3DModel"),
        signature={"double_blocks.0.video.mod.weight": 2, "single_blocks.0.mod.weight": 2, "patch_embedding.weight": 5},
        begins=("double_blocks.0.video.mod.weight", "double_blocks.0.img_mod.weight"),
        rename=own_name,
        config=transformer_config,
        blocks=(DOUBLE, SINGLE),
        split=split,
    ),
    TEXT_ENCODER: Part(
        what="Toy word encoder",
        published="nothing: tests write it",
        class_name=("_class_name", "ToyWords"),
        signature={"words.weight": 2, "layers.0.weight": 2},
        begins=("words.weight",),
        rename=lambda name: name,
        config=words_config,
        tokenizer_folder="toy_words",
    ),
    TEXT_ENCODER_2: Part(
        what="Toy prompt encoder",
        published="nothing: tests write it",
        class_name=("_class_name", "ToyPooled"),
        signature={"pieces.weight": 2, "projection.weight": 2},
        begins=("pieces.weight",),
        rename=lambda name: name,
        config=pooled_config,
        tokenizer_folder="toy_pieces",
    ),
    VAE: Part(
        what="Toy VAE",
        published="nothing: tests write it",
        class_name=("_class_name", "AutoencoderToy"),
        signature={"decoder.norm.weight": 1, "encoder.fold.weight": 5},
        begins=("decoder.norm.weight",),
        rename=lambda name: name,
        config=vae_config,
    ),
}


def cut_dim(name):
    """Heads and the feed-forward's width by columns, what reads them by rows; norms are of each head."""
    owner, _, kind = name.rpartition(".")
    if owner.endswith((".to_q", ".to_k", ".to_v", ".widen")):
        return 0
    return 1 if owner.endswith((".to_out", ".narrow")) and kind == "weight" else None


def fused_in_loras(shapes):
    """Layers of the file form that hold several of the network's."""
    owners = {name.rpartition(".to_q.")[0] for name in shapes if ".to_q." in name}
    layers = {owner: "linear1" if owner.startswith(SINGLE) else "qkv" for owner in owners}
    return [f"{owner}.{layer}.{kind}" for owner, layer in layers.items() for kind in ("weight", "bias")]


def spellings(known):
    """Layers are called in LoRA files as here, or as in the file form, whose blocks have fused ones."""
    layers = {name.rpartition(".")[0] for name in known}
    spelled = {layer.replace(".video.", ".img_").replace(".text.", ".txt_"): layer for layer in layers}
    spelled |= {layer: layer for layer in layers}
    return spelled | {name.replace(".", "_"): layer for name, layer in spelled.items()}


class Toy(Family):
    name = "toy"
    title = "Toy"
    parts = PARTS
    repository = "a folder that tests/helpers/toy_family writes"
    schedule = "toy"
    weights = WeightRules(cut_dim=cut_dim, in_8_bits=lambda layer: layer.endswith(("widen", "to_out")))
    loras = LoraNames(spellings, fused=fused_in_loras, split=split)

    def form(self, config):
        return VaeForm(config["out_channels"], SPATIAL, TEMPORAL, family=self.name)

    def vae_form(self, config):
        return VaeForm(config["z_dim"], SPATIAL, TEMPORAL, family=self.name)

    def latent_format(self, config, vae):
        return LatentFormat(MEAN, STD, RGB)

    def defaults(self, config, experts):
        return Defaults("Toy-1", steps=4, shift=2.0, guidance_scale=3.0, width=64, height=48, num_frames=9, fps=12)

    def grid(self, config, size):
        frames, height, width = size
        return frames, height // PATCH, width // PATCH

    def width(self, config):
        return config["num_attention_heads"] * config["attention_head_dim"]

    def text_width(self, config):
        return config["text_dim"]

    def pooled_width(self, config):
        return config["pooled_dim"]

    def text_in_sequence(self, config, tokens):
        return tokens

    def work(self, config, size):
        """Matrix products of the blocks: with S tokens, D wide, attention 4 S^2 D + 8 S D^2; the feed-forward is 2 D
        wide in single blocks, 4 D in double ones, each 4 S D times that."""
        width, tokens = self.width(config), size.tokens + size.text_tokens
        products, rest = 4 * tokens**2 * width, 4 * size.tokens * width * PATCH**2 * config["in_channels"]
        attention = products + 8 * tokens * width**2
        feeds = (4 * wide * tokens * width**2 for wide in (4, 2))
        double, single = (
            BlockWork(*(float(size.batch * flops) for flops in (products, attention, attention + feed)))
            for feed in feeds
        )
        blocks = (double,) * config["num_layers"] + (single,) * config["num_single_layers"]
        return Work(blocks, float(size.batch * rest))

    def heads(self, config):
        return self.width(config) // HEAD_DIM

    def smaller(self, config, heads, blocks):
        return {**config, "width": heads * HEAD_DIM, "num_layers": 1, "num_single_layers": blocks}

    def sliced_sums(self, config, size, video, itemsize, again=True):
        double, single = config["num_layers"], config["num_single_layers"]
        sums = (2 * double + single) * size.batch * size.on_rank * self.width(config)
        return SlicedSums(sums * itemsize, 4 * double + 2 * single)

    def sigmas(self, steps, shift, solver):
        """Shifted squares: as no other family spreads them."""
        times = [(1 - step / steps) ** 2 for step in range(steps + 1)]
        return tuple(shift * time / (1 + (shift - 1) * time) for time in times)

    def network(self, part, config, tp=None):
        from . import text, transformer, vae

        made = {TRANSFORMER: transformer.ToyTransformer, TEXT_ENCODER: text.Words, TEXT_ENCODER_2: text.Pooled,
                VAE: vae.AutoencoderToy}[part]  # fmt: skip
        return made(config) if tp is None else made(config, tp)

    def vae(self, network, form):
        from .vae import ToyVae

        return ToyVae(network, form)

    def text(self):
        from .text import ToyText

        return ToyText()

    def conditioner(self, config, latents):
        from ascend_runtime.models.shared.conditioning import Reads

        from .conditioning import ToyConditioner

        reads = Reads(self.form(config), self.text_width(config), self.pooled_width(config))
        return ToyConditioner(config, latents, reads)


FAMILY = Toy()
