"""The models that the loaders list: diffusers folders and .safetensors files where ComfyUI keeps them, and our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = "embedded/"  # prefix of the models that come with the pack


def diffusers_folders() -> dict[str, Path]:
    """Diffusers pipelines by name: those in models/diffusers, and the pack's own."""
    roots = [("", Path(folder)) for folder in folder_paths.get_folder_paths("diffusers")]
    found = {}
    for prefix, root in [*roots, (EMBEDDED, ASSETS)]:
        for index in sorted(root.glob("*/model_index.json")):
            found.setdefault(prefix + index.parent.name, index.parent)
    return found


def transformer_names() -> list[str]:
    """What Ascend Load Diffusion Model can load: diffusers folders first, then files of models/diffusion_models."""
    files = folder_paths.get_filename_list("diffusion_models")
    return [*diffusers_folders(), *(name for name in files if name.endswith(".safetensors"))]


def path_of(name: str) -> str:
    """The path that a listed name stands for. Raises ValueError that says where models belong."""
    folder = diffusers_folders().get(name)
    path = str(folder) if folder else folder_paths.get_full_path("diffusion_models", name)
    if path is None:
        folders = [*folder_paths.get_folder_paths("diffusers"), *folder_paths.get_folder_paths("diffusion_models")]
        raise ValueError(
            f"There is no model {name!r}. There are: {', '.join(transformer_names())}. Put a diffusers folder (such as "
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers from Hugging Face or ModelScope) into models/diffusers, or the "
            f".safetensors file of a transformer into models/diffusion_models. Looked in: {', '.join(folders)}."
        )
    return path


def lora_names() -> list[str]:
    """What Ascend Load LoRA can load: files of models/loras."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def lora_path_of(name: str) -> str:
    """The path that a listed LoRA stands for. Raises ValueError that says where LoRAs belong."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise ValueError(
            f"There is no LoRA {name!r}. There are: {', '.join(lora_names()) or 'none'}. Put its .safetensors file "
            f"into models/loras. Looked in: {', '.join(folder_paths.get_folder_paths('loras'))}."
        )
    return path


def check(name: str | None, find: Callable[[str], str] = path_of) -> bool | str:
    """For a node's validate_inputs: True, or what is wrong. None stands for a link, checked when the graph runs."""
    try:
        if name is not None:
            find(name)
    except ValueError as error:
        return str(error)
    return True
