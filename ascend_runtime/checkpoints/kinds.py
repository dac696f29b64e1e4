"""What a network is and how it is built, told by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import configs
from .faults import listed, usable
from .keys import TOKENIZER_MODEL, to_diffusers_name, to_umt5_name, to_vae_name
from .tensor_files import open_tensors


@dataclass(frozen=True)
class Kind:
    """How a network is known by its tensors alone."""

    what: str
    rename: Callable[[str], str | None]
    published: str  # the original's file, and where to get it
    tells: configs.Tells
    config: Callable[[configs.Shapes], dict]


HUBS = "from Hugging Face or ModelScope"
KINDS = {
    "transformer": Kind(
        what="Wan transformer",
        rename=to_diffusers_name,
        published=f"the shards of Wan-AI/Wan2.2-T2V-A14B {HUBS}",
        tells=configs.TRANSFORMER_TELLS,
        config=configs.transformer_config,
    ),
    "text_encoder": Kind(
        what="UMT5 text encoder",
        rename=to_umt5_name,
        published=f"models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl of Wan-AI/Wan2.2-T2V-A14B {HUBS}",
        tells=configs.TEXT_ENCODER_TELLS,
        config=configs.text_encoder_config,
    ),
    "vae": Kind(
        what="Wan VAE",
        rename=to_vae_name,
        published=f"Wan2.1_VAE.pth of Wan-AI/Wan2.2-T2V-A14B, or Wan2.2_VAE.pth of Wan2.2-TI2V-5B, {HUBS}",
        tells=configs.VAE_TELLS,
        config=configs.vae_config,
    ),
}


@dataclass(frozen=True)
class Described:
    config: dict
    first_blocks: tuple[int, ...]  # the number of the first block of each shard
    has_tokenizer: bool


@lru_cache(maxsize=16)
def described(kind_name: str, shards: tuple[Path, ...], _: tuple) -> Described:
    """What the shards hold. Kept until a file changes, so that a job on a loaded model opens none."""
    kind, shapes, first_blocks, has_tokenizer = KINDS[kind_name], {}, [], False
    for shard in shards:
        names = _names(shard)
        has_tokenizer |= TOKENIZER_MODEL in names
        # Pipeline stages number their blocks from 0; the shards of one network have no block in common.
        stages = shards[0].parent != shard.parent
        with usable(shard, "the names of its tensors"):
            found = {kind.rename(key): shape for key, shape in names.items()}
            first_blocks.append(configs.count(shapes, "blocks.") if stages else 0)
            shapes |= {moved(name, first_blocks[-1]): shape for name, shape in found.items() if name}
    missing = [name for name in kind.tells if name not in shapes]
    if missing[:2] == [*kind.tells][:2]:
        raise ValueError(
            f"{shards[0]} is not a {kind.what}: it has neither {' nor '.join(missing[:2])}. "
            f"Its first tensors are {', '.join(sorted(shapes)[:4])}."
        )
    if missing:
        raise ValueError(f"{shards[0]} lacks {', '.join(missing)} of a {kind.what}. Download it again.")
    misshapen = [
        f"{name} is {list(shapes[name])}, not of {dims} dims" for name, dims in kind.tells.items()
        if len(shapes[name]) != dims or 0 in shapes[name]
    ]  # fmt: skip
    if told := listed({"of the wrong shape": misshapen}):
        raise ValueError(f"{shards[0]} is no whole {kind.what}. Tensors {told}. Download it again.")
    with usable(shards[0], f"it as a {kind.what}"):
        return Described(kind.config(shapes), tuple(first_blocks), has_tokenizer)


@lru_cache(maxsize=16)
def is_kind(kind: str, file: Path, _: tuple) -> bool:
    names = {KINDS[kind].rename(name) for name in _names(file)}
    return any(name in names for name in [*KINDS[kind].tells][:2])


def _names(shard: Path) -> configs.Shapes:
    """The shapes of the tensors of a shard, by their names there."""
    with open_tensors(shard) as file:
        return dict(file.shapes)


def moved(name: str, blocks: int) -> str:
    """The name of the same parameter so many blocks later."""
    return re.sub(r"^blocks\.(\d+)", lambda number: f"blocks.{int(number[1]) + blocks}", name)
