"""The models that the loaders list: ComfyUI's folders and files, and the model that comes with the pack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy
import folder_paths

from ..ascend_runtime.checkpoints.paths import DESCRIPTION_PATTERN
from ..ascend_runtime.errors import coded_error
from ..ascend_runtime.models import family as parts
from ..ascend_runtime.models.hubs import HUBS
from ..ascend_runtime.models.registry import families
from ..ascend_runtime.recognition.lora.scale import IN_FOLDERS
from .page.validation import refusal

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = "embedded/"  # prefix of the models that come with the pack
CHECKPOINTS = "checkpoints"  # ComfyUI's folder of files that hold all networks of a model
IN_CHECKPOINTS = f"{CHECKPOINTS}/"  # prefix of these
SUFFIXES = (".safetensors", ".sft", ".pth", ".pt")
GGUF = ".gguf"  # which core's categories of files leave out
# A folder with one of these is a model: of diffusers, of the model's authors (both experts, or one; or all parts of a
# model, and its transformer), of MindSpeed-MM, of msModelSlim.
MARKS = (
    "model_index.json", "high_noise_model", "config.json", "*/transformers/mp_rank_00_model_states*.pt",
    "transformers/mp_rank_00_model_states*.pt", "latest_checkpointed_iteration.txt", DESCRIPTION_PATTERN,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """category: ComfyUI's, of single files. published: what to download, and where to put it. folders: whether a model
    may be a folder with one of MARKS. in_checkpoints: whether a file of all networks holds it too. weights: the files
    of which each makes its own folder a model. gguf: the category of GGUF files in the same folders, as the pack
    ComfyUI-GGUF calls it; empty: no such files are listed."""

    category: str
    published: str
    folders: bool = True
    in_checkpoints: bool = False
    weights: tuple[str, ...] = ()
    gguf: str = ""


FOLDER = (
    "a folder (such as Wan-AI/Wan2.2-T2V-A14B-Diffusers, Wan-AI/Wan2.2-T2V-A14B, hunyuanvideo-community/HunyuanVideo "
    f"or tencent/HunyuanVideo, {HUBS}) into models/diffusers"
)
TRANSFORMER = Kind(
    "diffusion_models",
    "a file (of Comfy-Org/Wan_2.1_ComfyUI_repackaged, Comfy-Org/Wan_2.2_ComfyUI_Repackaged or "
    f"Comfy-Org/HunyuanVideo_repackaged, {HUBS}) into models/diffusion_models, or {FOLDER}",
    in_checkpoints=True,
    gguf="unet_gguf",
)
TEXT_ENCODER = Kind(
    "text_encoders",
    "a file (umt5_xxl_fp8_e4m3fn_scaled.safetensors of Comfy-Org/Wan_2.1_ComfyUI_repackaged for Wan; both "
    "llava_llama3_fp8_scaled.safetensors and clip_l.safetensors of Comfy-Org/HunyuanVideo_repackaged for HunyuanVideo; "
    f"{HUBS}) into models/text_encoders, or {FOLDER}",
    in_checkpoints=True,
    gguf="clip_gguf",
)
VISION = Kind(
    "clip_vision",
    f"a file (llava_llama3_vision.safetensors of Comfy-Org/HunyuanVideo_repackaged, {HUBS}) into models/clip_vision, "
    f"or a folder (hunyuanvideo-community/HunyuanVideo-I2V, {HUBS}) into models/diffusers",
)
VAE = Kind(
    "vae",
    "a file (wan_2.1_vae.safetensors or wan2.2_vae.safetensors of Comfy-Org/Wan_2.2_ComfyUI_Repackaged, or "
    f"hunyuan_video_vae_bf16.safetensors of Comfy-Org/HunyuanVideo_repackaged, {HUBS}) into models/vae, or {FOLDER}",
    in_checkpoints=True,
)
LORA = Kind(
    "loras",
    "the .safetensors file of a LoRA for this model (LightX2V's for Wan are in Comfy-Org/Wan_2.2_ComfyUI_Repackaged, "
    f"{HUBS}), or PEFT's folder (with adapter_config.json), into models/loras",
    folders=False,
    weights=IN_FOLDERS,
)


def folders(kind: Kind) -> dict[str, Path]:
    """Models that are folders, by name: those in models/diffusers and in the kind's own folder, and the pack's own."""
    roots = [("", Path(place)) for place in _places(kind)]
    found = {}
    for prefix, root in [*roots, (EMBEDDED, ASSETS)] if kind.folders else ():
        for folder in sorted(root.glob("*/")):
            if any(any(folder.glob(mark)) for mark in MARKS):
                found.setdefault(prefix + folder.name, folder)
    for file in filter(partial(_makes_folder, kind), folder_paths.get_filename_list(kind.category)):
        path = folder_paths.get_full_path(kind.category, file)
        if path is not None:
            found.setdefault(Path(file).parent.as_posix(), Path(path).parent)
    return found


def names(kind: Kind) -> list[str]:
    """What a loader of this kind can load: folders first, then files, then files of all networks."""
    listed = folders(kind)
    files = [name for name in folder_paths.get_filename_list(kind.category) if name.endswith(SUFFIXES)]
    files += _gguf_files(kind)
    if kind.weights:
        return [*listed, *(name for name in files if not _makes_folder(kind, name))]
    return [*listed, *(name for name in files if Path(name).parts[0] not in listed), *_checkpoints(kind)]


def _gguf_files(kind: Kind) -> list[str]:
    """GGUF files in the folders of a category, which ComfyUI lists by endings that lack theirs."""
    if not kind.gguf:
        return []
    folder_paths.folder_names_and_paths[kind.gguf] = (folder_paths.get_folder_paths(kind.category), {GGUF})
    return [name for name in folder_paths.get_filename_list(kind.gguf) if name.endswith(GGUF)]


def _checkpoints(kind: Kind) -> list[str]:
    """Files in models/checkpoints, by names that speak of one of our models: most others are of other models, and their
    headers would take long to read."""
    found = folder_paths.get_filename_list(CHECKPOINTS) if kind.in_checkpoints else []
    known = [one.stock for one in families().values()]
    return [f"{IN_CHECKPOINTS}{name}" for name in found if any(one.are_in(name, parts.TRANSFORMER) for one in known)]


def _makes_folder(kind: Kind, name: str) -> bool:
    """Whether a file, by its path in the category's folders, makes the folder that it is in a model."""
    return Path(name).name in kind.weights and len(Path(name).parts) > 1


def path_of(name: str, kind: Kind) -> str:
    """The path of a listed name. Raises ValueError, with the names and folders that there are, for any other."""
    folder = folders(kind).get(name) if isinstance(name, str) else None
    path = folder and str(folder)
    if path is None and isinstance(name, str) and "\0" not in name:
        path = folder_paths.get_full_path(kind.category, name)
        if path is None and kind.in_checkpoints and name.startswith(IN_CHECKPOINTS):
            path = folder_paths.get_full_path(CHECKPOINTS, name.removeprefix(IN_CHECKPOINTS))
    if path is None:
        raise coded_error(
            "AV-1301",
            f"There is no model {name!r}. Models that were found: {', '.join(names(kind)) or 'none'}. To add one, put "
            f"{kind.published}. Folders that were searched: {', '.join(_places(kind))}.",
        )
    return path


def _places(kind: Kind) -> list[str]:
    in_common = folder_paths.get_folder_paths("diffusers") if kind.folders else []
    return [*in_common, *folder_paths.get_folder_paths(kind.category)]


def core_tokenizers() -> dict[str, str]:
    """The folders of the tokenizers of Llama 3 and CLIP-L that come with ComfyUI, as fields of TextEncoderSpec."""
    core = Path(next(iter(comfy.__path__)))
    places = {
        "tokenizer_path": core / "text_encoders" / "llama_tokenizer",
        "tokenizer_path_2": core / "sd1_tokenizer",
    }
    return {field: str(folder) for field, folder in places.items() if folder.is_dir()}


def check(name: str | None, kind: Kind) -> bool | str:
    """For a node's validate_inputs: True, or the error. None stands for a link, checked when the graph runs."""
    return refusal(partial(path_of, kind=kind), name)
