"""The arguments of the command, and what their names mean. Does not import torch."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...models.hubs import ENDPOINTS, HUGGING_FACE, HubFile
from ...models.registry import families
from .. import templates
from ..doctor.comfyui import folder_of_comfyui
from ..doctor.surroundings import Surroundings

MOST_BYTES = 2**24  # of a workflow


def declare_download(parser: ArgumentParser) -> None:
    parser.description = (
        "Downloads the files of published models into the folders of ComfyUI's models, and checks their hashes.\n"
        "Files that are there stay. After an interruption, the same command continues.\n\n"
        f"NAME is one of {', '.join(published_files())}; a template of the pack by its name; the file of a "
        "workflow; or one file."
    )
    parser.epilog = """
variables: HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors; HF_TOKEN is sent to Hugging Face

exit status: 0 all files are there; 1 a file is not; 2 an invalid argument; 130 interrupted"""
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="what to download; small and capital letters are equal")
    add("--from", dest="hub", choices=tuple(ENDPOINTS), default=HUGGING_FACE, help="(default: %(default)s)")
    add("--comfyui", type=Path, metavar="DIR",
        help="ComfyUI's folder (default: the one that the pack is in, or COMFYUI_DIR)")  # fmt: skip
    add("--models", type=Path, metavar="FOLDER",
        help="a folder of models instead, with diffusion_models, vae ... in it")  # fmt: skip
    add("--list", action="store_true", help="list what can be downloaded, and end")
    add("--dry-run", action="store_true", help="show files, sizes and what is missing; download nothing")
    add("--verify", action="store_true", help="check the hashes of files that are there, too")


def check_download(arguments: Namespace) -> None:
    """Raises ValueError for unknown names, and if there is no folder of models."""
    if arguments.list:
        return
    if not arguments.names:
        raise ValueError("NAME is missing. --list shows what can be downloaded.")
    wanted_files(arguments.names)
    models_folder(arguments)


def begins_download(arguments: Namespace) -> str:
    if arguments.list:
        return "published models and their files"
    return f"looking for {', '.join(arguments.names)} at {arguments.hub}"


def published_files() -> dict[str, tuple[HubFile, ...]]:
    """All that can be downloaded, by name."""
    return {name: files for family in families().values() for name, files in family.downloads.items()}


def files_by_name() -> dict[str, HubFile]:
    """Each file that can be downloaded, by its name in a folder of models."""
    return {file.name: file for files in published_files().values() for file in files}


def wanted_files(names: list[str]) -> list[HubFile]:
    """The files that names mean, each once. Raises ValueError for a name that means none."""
    return list(dict.fromkeys(file for name in names for file in _files_of(name)))


def _files_of(name: str) -> tuple[HubFile, ...]:
    known, single = published_files(), files_by_name()
    found = {_plain(one): files for one, files in known.items()}
    found |= {_plain(one): (file,) for one, file in single.items()}
    if _plain(name) in found:
        return found[_plain(name)]
    workflow = _workflow(name)
    if workflow is not None:
        files = tuple(single[text] for text in dict.fromkeys(_texts(workflow)) if text in single)
        if files:
            return files
        raise ValueError(f"The workflow {name} names no published file that this command knows; --list shows them.")
    raise ValueError(f"{name!r} is not known. It can be one of {', '.join(known)}, the name of a template of the pack, "
                     "a workflow's file, or one of the files that --list shows.")  # fmt: skip


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def _workflow(name: str) -> Any:
    """The content of a template of the pack, by one of its names, or of a workflow's file; None if there is neither."""
    template = templates.named(name) if Path(name).name == name else None
    place = template or Path(name)
    if (template is None and not name.endswith(".json")) or not place.is_file() or place.stat().st_size > MOST_BYTES:
        return None
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{place} is not a workflow: it is not JSON.") from None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    waiting = [value]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, str):
            yield one
        elif isinstance(one, (list, dict)):
            waiting += one.values() if isinstance(one, dict) else one


def models_folder(arguments: Namespace) -> Path:
    """The folder of models to write to. Raises ValueError without one."""
    if arguments.models is not None:
        folder = arguments.models.expanduser().absolute()
        if not folder.is_dir():
            raise ValueError(f"--models is {arguments.models}, which is not a folder. Create it, or give another.")
        return folder
    if arguments.comfyui is not None:
        folder = arguments.comfyui.expanduser().absolute()
        if not (folder / "models").is_dir():
            raise ValueError(f"--comfyui is {arguments.comfyui}, which has no folder models. Give ComfyUI's folder.")
        return folder / "models"
    found = folder_of_comfyui(Surroundings("cpu"))
    if found is None:
        raise ValueError("The pack is not in a ComfyUI. Give ComfyUI's folder with --comfyui, or a folder for models "
                         "with --models.")  # fmt: skip
    return found / "models"
