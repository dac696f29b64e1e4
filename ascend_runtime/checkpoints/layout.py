"""Where the files of a component lie: diffusers folders, and single .safetensors files of a transformer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .keys import to_diffusers_name
from .reader import open_shard


@dataclass(frozen=True)
class Component:
    """A network on disk: its config, its shards in the order to be read, and what was in them when it was found."""

    folder: Path
    config: dict
    shards: tuple[Path, ...]
    original_names: bool  # parameter names of the original Wan rather than diffusers'

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file on disk does: the weights, and what says how to use them."""
        root = self.folder.parent
        described = [self.folder / "config.json", root / "model_index.json", root / "vae" / "config.json"]
        files = self.shards if self.original_names else (*filter(Path.is_file, described), *self.shards)
        return tuple((str(file), *_state(file)) for file in files)

    @property
    def nbytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def find_component(path: str, name: str) -> Component:
    """The component `name` ("transformer", "vae", ...) of the diffusers folder `path`, or `path` if that is one.

    Raises ValueError that says what is missing and what was expected.
    """
    root = existing(path)
    if root.is_file():
        raise ValueError(f"{root} is a file; give a diffusers folder, which holds {name}/config.json.")
    folder = root / name if (root / name).is_dir() else root
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(entry.name for entry in root.iterdir())) or "nothing"
        raise ValueError(
            f"{root} has no {name}/config.json; it holds {held}. Give a diffusers folder, such as a download of "
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers from Hugging Face or ModelScope."
        )
    return Component(folder, read_json(folder / "config.json"), _shards_of(folder), original_names=False)


def find_transformer(path: str, name: str = "transformer") -> Component:
    """A diffusion transformer: in a diffusers folder, or a single .safetensors file with the original's names."""
    root = existing(path)
    return _single_transformer(root, *_state(root)) if root.is_file() else find_component(path, name)


def frames_shape(vae_path: str, latent_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The frames [B*T',H',W',3] that a VAE makes of a latent [B,C,T,H,W], from its config alone.

    Raises ValueError where there is no such VAE, or the latent is not a video's.
    """
    if len(latent_shape) != 5 or not all(latent_shape):
        raise ValueError(f"The latent has the shape {list(latent_shape)}; a video's is [B,C,T,H,W], all 1 or more.")
    config = find_component(vae_path, "vae").config
    spatial, temporal = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    batch, _, frames, height, width = latent_shape
    return batch * ((frames - 1) * temporal + 1), height * spatial, width * spatial, 3


def has_component(path: str, name: str) -> bool:
    """Whether the diffusers folder `path` holds the component `name`."""
    return (Path(path) / name / "config.json").is_file()


def existing(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"{root} does not exist. Give the path of a diffusers folder or of a .safetensors file.")
    return root


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from None


def _shards_of(folder: Path) -> tuple[Path, ...]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(read_json(indices[0])["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {indices[0].name} lists. Download them.")
        return tuple(folder / name for name in names)
    shards = tuple(sorted(folder.glob("*.safetensors")))
    if not shards:
        raise ValueError(f"{folder} has no .safetensors file. Download the weights beside config.json.")
    return shards


def _state(file: Path) -> tuple[int, int]:
    """Size and time of the last change."""
    return file.stat().st_size, file.stat().st_mtime_ns


@lru_cache(maxsize=8)
def _single_transformer(path: Path, size: int, changed_ns: int) -> Component:
    """A file as ComfyUI's users have: the original's names, with or without a prefix; the config is in the shapes.

    Kept until the file changes, so that a job on a loaded model opens none.
    """
    with open_shard(path) as shard:
        shapes = {to_diffusers_name(key): shard.get_slice(key).get_shape() for key in shard.keys()}
        dtypes = {shard.get_slice(key).get_dtype() for key in shard.keys()}
    if "patch_embedding.weight" not in shapes or "blocks.0.ffn.net.0.proj.weight" not in shapes:
        raise ValueError(
            f"{path} is not a Wan transformer: it has no patch_embedding and no blocks. "
            f"Its first tensors are {', '.join(sorted(shapes)[:4])}."
        )
    if any(dtype.startswith("F8") for dtype in dtypes):
        raise ValueError(f"{path} holds fp8 weights, which cannot be read yet. Take the model's fp16 or bf16 file.")
    return Component(path.parent, _config_of(shapes), (path,), original_names=True)


def _config_of(shapes: dict[str, list[int]]) -> dict:
    """The config of diffusers' WanTransformer3DModel, read off the shapes; the original's head_dim is always 128."""
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    has_image = "condition_embedder.image_embedder.ff.net.0.proj.weight" in shapes
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // 128,
        "attention_head_dim": 128,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // int(torch.tensor(patch).prod()),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "added_kv_proj_dim": dim if has_image else None,
        "image_dim": shapes["condition_embedder.image_embedder.norm1.weight"][0] if has_image else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }
