"""Where the files of a component lie: diffusers folders, and single .safetensors files of a transformer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .keys import to_diffusers_name
from .reader import open_shard

KINDS = {  # of component: the key of its config that tells, and what it says
    "transformer": ("_class_name", "WanTransformer3DModel"),
    "text_encoder": ("model_type", "umt5"),
    "vae": ("_class_name", "AutoencoderKLWan"),
}
STANDARD_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers', transformers'


@dataclass(frozen=True)
class Component:
    """A network on disk: its config, its shards in the order to be read, and what was in them when it was found."""

    config: dict
    shards: tuple[Path, ...]
    folder: Path | None  # of a diffusers component; None for a single file
    original_names: bool = False  # parameter names of the original Wan rather than diffusers'

    @property
    def root(self) -> Path | None:
        """The diffusers pipeline that it belongs to; None for a single file."""
        return self.folder and self.folder.parent

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file on disk does: the weights, and what says how to use them."""
        described = ()
        if self.folder:
            described = (self.folder / "config.json", self.root / "model_index.json", self.root / "vae" / "config.json")
        return tuple((str(file), *_state(file)) for file in (*filter(Path.is_file, described), *self.shards))

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
    config = read_json(folder / "config.json")
    _check_kind(config, name, folder)
    return Component(config, _shards_of(folder), folder)


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


def _check_kind(config: dict, name: str, folder: Path) -> None:
    """diffusers and transformers write into a config what network it is of, each in its way."""
    key, wanted = KINDS[name.removesuffix("_2")]
    if config.get(key, wanted) != wanted:
        raise ValueError(f"{folder} holds a {config[key]}; a {wanted} is wanted here.")


def existing(path: str) -> Path:
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"{root} does not exist. Give the path of a diffusers folder or of a .safetensors file.")
    return root


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object. Download it again.")
    return content


def _shards_of(folder: Path) -> tuple[Path, ...]:
    """The weights of a component: those with the libraries' standard name where there are, else all that lie there."""
    for index in _preferred(folder, "*.safetensors.index.json", [f"{name}.index.json" for name in STANDARD_NAMES]):
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise ValueError(f"{folder} lacks {', '.join(missing) or 'weights'}, see {index.name}. Download them.")
        return tuple(folder / name for name in names)
    shards = _preferred(folder, "*.safetensors", STANDARD_NAMES)
    if not shards:
        raise ValueError(f"{folder} has no .safetensors file. Download the weights beside config.json.")
    return shards


def _preferred(folder: Path, pattern: str, names: Iterable[str]) -> tuple[Path, ...]:
    """The file with one of `names` where it lies in `folder`, else all that fit the pattern."""
    for name in names:
        if (folder / name).is_file():
            return (folder / name,)
    return tuple(sorted(folder.glob(pattern)))


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
    if "patch_embedding.weight" not in shapes or "blocks.0.ffn.net.0.proj.weight" not in shapes:
        raise ValueError(
            f"{path} is not a Wan transformer: it has no patch_embedding and no blocks. "
            f"Its first tensors are {', '.join(sorted(shapes)[:4])}."
        )
    return Component(_config_of(shapes, path), (path,), folder=None, original_names=True)


def _config_of(shapes: dict[str, list[int]], path: Path) -> dict:
    """The config of diffusers' WanTransformer3DModel, read off the shapes; the original's head_dim is always 128."""
    missing = [name for name in _TELLING if name not in shapes]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} of a Wan transformer. Download it again.")
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    has_image = "condition_embedder.image_embedder.ff.net.0.proj.weight" in shapes
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // 128,
        "attention_head_dim": 128,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "added_kv_proj_dim": dim if has_image else None,
        "image_dim": shapes["condition_embedder.image_embedder.norm1.weight"][0] if has_image else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }


_TELLING = (
    "proj_out.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "condition_embedder.time_embedder.linear_1.weight",
)
