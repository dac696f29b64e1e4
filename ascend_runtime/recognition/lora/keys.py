"""Parses the keys of LoRA files: the transformer layer, the role and the expert of each.

    diffusers, PEFT      transformer.blocks.0.attn1.to_q.lora_A.weight     .lora_B.weight .lora_B.bias
    the original's names diffusion_model.blocks.0.self_attn.q.lora_down.weight     .lora_up.weight .alpha .diff .diff_b
    kohya, OneTrainer    lora_unet_blocks_0_self_attn_q.lora_down.weight   .lora_up.weight .alpha .dora_scale
    HunyuanVideo-I2V     Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv.lora_down.weight   .alpha
    older diffusers      transformer.blocks.0.attn1.to_q.lora.down.weight  .lora.up.weight
    PEFT, one of several base_model.model.blocks.0.attn1.to_q.lora_A.NAME.weight   .lora_magnitude_vector.NAME
    LightX2V             diffusion_model.blocks.0.diff_m                   a difference of that block's modulation
    LyCORIS              lycoris_blocks_0_attn1_to_q.hada_w1_a             .lokr_w1 .lora_mid.weight .w_norm .b_norm

A key has the same meaning in all of these layouts, or occurs in only one, so each key is parsed separately, with any
prefixes or none, and with dots or underscores. If some keys begin with `transformer_2.` or another name of the
low-noise expert, these are for it, and keys with `transformer.` are for the high-noise expert. Keys of text encoders,
which trainers write into the same file, are left out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from ...models.family import LoraNames
from ...models.shapes import Shapes

Keys = dict[str, list[str]]  # by what an error or a warning says about them

HIGH_NOISE, LOW_NOISE = "high_noise", "low_noise"
LOW = r"transformer_2|pipe\.dit2|dit2|low_noise(_model)?"
HIGH = r"transformer_1|high_noise(_model)?"
MAIN = r"transformer|pipe\.dit"  # the high-noise expert next to a low-noise one, else the only network
PREFIX = re.compile(
    r"^(lora_unet__?|lora_transformer_|lycoris_|Hunyuan_video_I2V_lora_|"
    rf"(({LOW}|{HIGH}|{MAIN}|dit|base_model\.model|diffusion_model|model|net|unet|module"
    r"|_orig_mod|_fsdp_wrapped_module)\.)*)"
)
OF_EXPERTS = {LOW_NOISE: re.compile(rf"(^|\.)({LOW})\."), HIGH_NOISE: re.compile(rf"(^|\.)({HIGH}|{MAIN})\.")}
ONLY_HIGH = re.compile(rf"(^|\.)({HIGH})\.")
# PEFT's name of an adapter, where others have none; what torch wraps modules in.
INSERTED = re.compile(r"(?<=\.lora_[AB])\.(?!(weight|bias)$)[\w-]+(?=\.(weight|bias)$|$)"
                      r"|(?<=\.lora_magnitude_vector)(\.[\w-]+){1,2}$"
                      r"|(?<=\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")  # fmt: skip
OF_TEXT = re.compile(r"^((lora_te\d?_|text_encoders?(_\d)?[._]|te\d?[._]|llama\.|clip_[lg]\.)|bundle_emb\.)")
# LyCORIS's names of the factors of LoHa and LoKr.
HADA, HADA_CORES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2")
LOKR = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))  # whole, or a product
LOKR_CORE = "lokr_t2"
MAGNITUDES = {"dora_scale": False, "magnitude": True}  # of DoRA: whether a norm for outputs includes the change
ROLES = {
    "lora_A.weight": "down", "lora_A": "down", "lora_down.weight": "down", "lora.down.weight": "down",
    "lora_B.weight": "up", "lora_B": "up", "lora_up.weight": "up", "lora.up.weight": "up", "lora_B.bias": "up_bias",
    "alpha": "alpha", "diff": "diff", "diff_b": "diff_b", "diff_m": "diff_m", "w_norm": "diff", "b_norm": "diff_b",
    "lora_mid.weight": "mid", "dora_scale": "dora_scale", "lora_magnitude_vector": "magnitude",
} | {role: role for role in (*HADA, *HADA_CORES, *chain(*LOKR[0], *LOKR[1]), LOKR_CORE)}  # fmt: skip
# Formats that change weights by other formulas, or with an alpha that is not in the file.
OTHER_FORMATS = {
    "OFT": re.compile(r"\.(oft_\w+|boft_\w+)(\.\w+)*$"),
    "GLoRA (LyCORIS)": re.compile(r"\.(a1|a2|b1|b2)\.weight$"),
    "LyCORIS with a trained scalar": re.compile(r"\.scalar$"),
    "whole weights, which replace the model's": re.compile(r"\.set_weight$"),
    "a change of a weight's shape": re.compile(r"\.reshape_weight$"),
    "Stand-In": re.compile(r"_loras\.(down|up)\.weight$"),
}
# Why keys are left out or rejected.
FOR_LOW_NOISE = "of a low-noise expert, which this model lacks"
FOR_TEXT = "of text encoders, which LoRAs do not change here"
UNKNOWN_KIND, TWICE = "of an unknown kind", "given twice"


@dataclass
class ParsedKeys:
    """The keys of a file.

    layers: the key of each role, for each layer, or parameter outside of layers, by diffusers' name.
    left_out: keys of layers that this model lacks. faults: keys that cannot be parsed. other_formats: keys of formats
    other than low-rank pairs and differences. other_expert: the number of keys for the other expert.
    """

    layers: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    left_out: Keys = field(default_factory=lambda: defaultdict(list))
    faults: Keys = field(default_factory=lambda: defaultdict(list))
    other_formats: Keys = field(default_factory=lambda: defaultdict(list))
    other_expert: int = 0


def parse_keys(keys: Iterable[str], shapes: Shapes, names: LoraNames, expert: str | None) -> ParsedKeys:
    """Parses a file's keys for a network whose parameters have these full shapes.

    names: the family's names. expert: which of two experts it is ("high_noise" or "low_noise"); None: there is only
    one.
    """
    found, known = ParsedKeys(), {*shapes, *names.further(shapes)}
    spellings = names.spellings(known)
    own = {name.removesuffix(".weight").removesuffix(".bias") for name in shapes}
    for key, whose in experts_of(keys).items():
        if expert is not None and whose not in (None, expert):
            found.other_expert += 1
            continue
        if is_for_text(key):
            found.left_out[FOR_TEXT].append(key)
            continue
        other = other_format(key)
        layer, role = _meaning(key, spellings)
        if other is not None:
            found.other_formats[other].append(key)
        elif role is None:
            found.faults[UNKNOWN_KIND].append(key)
        elif layer in own and (expert is not None or whose != LOW_NOISE):
            _add(found, layer, role, key)
        else:
            found.left_out[FOR_LOW_NOISE if whose == LOW_NOISE else names.left_out(key, layer)].append(key)
    return found


def module_and_role(key: str) -> tuple[str, str | None]:
    """(the layer's name in the software that trained the LoRA, the key's role in it; None if unknown)"""
    rest = INSERTED.sub("", PREFIX.sub("", key))
    suffix = next((suffix for suffix in ROLES if rest.endswith(f".{suffix}")), None)
    return (rest, None) if suffix is None else (rest.removesuffix(f".{suffix}"), ROLES[suffix])


def other_format(key: str) -> str | None:
    """The unsupported format that a key belongs to; None: it may be supported."""
    return next((what for what, pattern in OTHER_FORMATS.items() if pattern.search(key)), None)


def is_for_text(key: str) -> bool:
    """Whether a key is for a text encoder."""
    return OF_TEXT.match(key) is not None


def experts_of(keys: Iterable[str]) -> dict[str, str | None]:
    """The expert that each key is for; None: for both."""
    keys = tuple(keys)
    named = {key: _named(key) for key in keys}
    of_two = LOW_NOISE in named.values() or any(ONLY_HIGH.search(PREFIX.match(key)[0]) for key in keys)
    return {key: whose if of_two else None for key, whose in named.items()}


def section(key: str) -> str:
    """The part of a diffusers pipeline that a key belongs to."""
    return "transformer_2" if _named(key) == LOW_NOISE else "transformer"


def _add(found: ParsedKeys, layer: str, role: str, key: str) -> None:
    if role in found.layers[layer]:
        found.faults[TWICE].append(f"{key} and {found.layers[layer][role]}")
    else:
        found.layers[layer][role] = key


def _named(key: str) -> str | None:
    prefix = PREFIX.match(key)[0]
    return next((expert for expert, pattern in OF_EXPERTS.items() if pattern.search(prefix)), None)


def _meaning(key: str, spellings: dict[str, str]) -> tuple[str | None, str | None]:
    """(the layer that a key changes, its role in that layer); each None if unknown."""
    name, role = module_and_role(key)
    if role == "diff_m":
        return spellings.get(f"{name}.modulation") or spellings.get(f"{name}_modulation"), "diff"
    return (spellings.get(name) or spellings.get(name.replace(".", "_")), role) if role else (None, None)
