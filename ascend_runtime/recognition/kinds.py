"""What a network is and how it is built, told by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..checkpoints.faults import listed, shown, usable
from ..checkpoints.formats.tensor_files import open_tensors
from ..checkpoints.renaming import is_tokenizer
from ..checkpoints.shards import one_of_several
from ..checkpoints.states import content_state
from ..models.wan import configs
from ..models.wan.names import to_diffusers_name, to_umt5_name, to_vae_name
from ..models.wan.variants import variant


@dataclass(frozen=True)
class Kind:
    """How a network is known by its tensors.

    begins: names of one of its tensors in any system; what is before one in a file is the network's prefix there.
    another: says that tensors of these names and shapes are of another network, near to it; empty: they are not.
    """

    what: str
    rename: Callable[[str], str | None]
    published: str  # the original's file, and where to get it
    tells: configs.Tells
    config: Callable[[configs.Shapes], dict]
    begins: tuple[str, ...]
    another: Callable[[configs.Shapes], str] = lambda shapes: ""


# What is before the names of the other networks in a file of a whole model, as ComfyUI saves it.
NETWORKS = re.compile(r"^(model\.diffusion_model|vae|first_stage_model|text_encoders|cond_stage_model|clip_vision)\.")
MOST_PREFIXES = 4  # that an error lists
HUBS = "from Hugging Face or ModelScope"
KINDS = {
    "transformer": Kind(
        what="Wan transformer",
        rename=to_diffusers_name,
        published=f"the shards of Wan-AI/Wan2.2-T2V-A14B {HUBS}",
        tells=configs.TRANSFORMER_TELLS,
        config=configs.transformer_config,
        begins=("patch_embedding.weight",),
        another=variant,
    ),
    "text_encoder": Kind(
        what="UMT5 text encoder",
        rename=to_umt5_name,
        published=f"models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl of Wan-AI/Wan2.2-T2V-A14B {HUBS}",
        tells=configs.TEXT_ENCODER_TELLS,
        config=configs.text_encoder_config,
        begins=("encoder.block.0.layer.0.SelfAttention.q.weight", "blocks.0.attn.q.weight"),
        another=configs.other_text_encoder,
    ),
    "vae": Kind(
        what="Wan VAE",
        rename=to_vae_name,
        published=f"Wan2.1_VAE.pth of Wan-AI/Wan2.2-T2V-A14B, or Wan2.2_VAE.pth of Wan2.2-TI2V-5B, {HUBS}",
        tells=configs.VAE_TELLS,
        config=configs.vae_config,
        begins=("encoder.conv_in.weight", "encoder.conv1.weight"),
    ),
}


@dataclass(frozen=True)
class Described:
    config: dict
    first_blocks: tuple[int, ...]  # the number of the first block of each shard
    has_tokenizer: bool
    prefix: str  # before all its tensors' names


@lru_cache(maxsize=16)
def described(kind_name: str, shards: tuple[Path, ...], _: tuple) -> Described:
    """What the shards hold. Kept until a file changes, so that a job on a loaded model opens none."""
    kind, shapes, first_blocks, has_tokenizer = KINDS[kind_name], {}, [], False
    held = {shard: _names(shard) for shard in shards}
    prefix = _prefix(kind, shards[0], [name for names in held.values() for name in names])
    for shard, names in held.items():
        has_tokenizer |= any(is_tokenizer(name) for name in names)
        # Pipeline stages number their blocks from 0; the shards of one network have no block in common.
        stages = shards[0].parent != shard.parent
        with usable(shard, "the names of its tensors"):
            found = {own_name(kind, prefix, key): shape for key, shape in names.items()}
            first_blocks.append(configs.count(shapes, "blocks.") if stages else 0)
            shapes |= {moved(name, first_blocks[-1]): shape for name, shape in found.items() if name}
    missing = [name for name in kind.tells if name not in shapes]
    said = kind.another(shapes) or (missing and len(shards) == 1 and one_of_several(shards[0]))
    if missing[:2] == [*kind.tells][:2]:
        raise ValueError(
            f"{shards[0]} is not a {kind.what}: it has neither {' nor '.join(missing[:2])}. "
            f"{said or f'Its first tensors are {_first(shapes)}.'}"
        )
    if missing:
        raise ValueError(
            f"{shards[0]} lacks {', '.join(missing)} of a {kind.what}. {said or _said_of_a_part(kind, shapes)}"
        )
    if said:
        raise ValueError(f"{shards[0]} is not a plain {kind.what}. {said}")
    misshapen = [
        f"{name} is {list(shapes[name])}, not of {dims} dims" for name, dims in kind.tells.items()
        if len(shapes[name]) != dims or 0 in shapes[name]
    ]  # fmt: skip
    if told := listed({"of the wrong shape": misshapen}):
        raise ValueError(f"{shards[0]} is no whole {kind.what}. Tensors {told}. Download it again.")
    with usable(shards[0], f"it as a {kind.what}"):
        return Described(kind.config(shapes), tuple(first_blocks), has_tokenizer, prefix)


def is_kind(name: str, file: Path) -> bool:
    """Raises ValueError where the file cannot be read, or holds several networks of this kind. A file is read once for
    each kind until it changes, by whichever links, and whatever came of it."""
    known = _known_of_kinds(content_state(file))
    if name not in known:
        try:
            known[name] = _fits(KINDS[name], file), "", str(file)
        except ValueError as error:
            known[name] = False, str(error), str(file)
    fits, fault, first = known[name]
    if fault:
        raise ValueError(fault.replace(first, str(file)))
    return fits


@lru_cache(maxsize=64)
def _known_of_kinds(state: tuple) -> dict[str, tuple[bool, str, str]]:
    """What is known of a file in this state, by kind: whether it is one, why this is not known, its path then."""
    return {}


def _fits(kind: Kind, file: Path) -> bool:
    held = _names(file)
    prefix = _prefix(kind, file, held)
    names = {own_name(kind, prefix, name) for name in held}
    return any(name in names for name in [*kind.tells][:2])


def near_to(file: Path) -> str:
    """What a file is that holds no network of these kinds, as far as it is known; else empty."""
    return variant(_names(file)) or one_of_several(file)


def own_name(kind: Kind, prefix: str, key: str) -> str | None:
    """The name of the network's parameter that a tensor is; None where it is none of it: behind another prefix than the
    network's lie other networks of a whole model's file."""
    if is_tokenizer(key):
        return None
    if prefix and not key.startswith(prefix):
        return None if NETWORKS.match(key) else key
    return kind.rename(key[len(prefix) :])


def _prefix(kind: Kind, file: Path, names: Iterable[str]) -> str:
    """What is before the names of a network's tensors. Raises ValueError where the file holds several such networks."""
    found = {name.removesuffix(begin) for name in names for begin in kind.begins if name.endswith(begin)}
    found = {prefix for prefix in found if not prefix or prefix.endswith(".")}
    if len(found) > 1 and "" not in found:
        first = ", ".join(map(shown, sorted(found)[:MOST_PREFIXES])) + ", ..." * (len(found) > MOST_PREFIXES)
        raise ValueError(
            f"{file} holds {len(found)} networks that are a {kind.what} each: {first}. Save the one "
            "that is wanted into a file of its own."
        )
    return found.pop() if len(found) == 1 else ""


def _said_of_a_part(kind: Kind, shapes: configs.Shapes) -> str:
    blocks_only = all(name.startswith("blocks.") for name in shapes)
    if kind.what == "Wan transformer" and blocks_only:
        return (
            "It holds blocks only, as LightX2V's files of single blocks do, which are not read. Take the model's "
            "fp8_scaled, fp16 or bf16 form in one file, or in a folder with all its shards."
        )
    return "Download it again."


def _first(shapes: configs.Shapes) -> str:
    return ", ".join(map(shown, sorted(shapes)[:4]))


def _names(shard: Path) -> configs.Shapes:
    """The shapes of the tensors of a shard, by their names there."""
    with open_tensors(shard) as file:
        return dict(file.shapes)


def moved(name: str, blocks: int) -> str:
    """The name of the same parameter so many blocks later."""
    return re.sub(r"^blocks\.(\d+)", lambda number: f"blocks.{int(number[1]) + blocks}", name)
