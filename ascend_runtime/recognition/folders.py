"""Model folders as each system writes them: which parts they contain, and in which files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

from ..checkpoints.bounded import plain_file_name, read_json
from ..checkpoints.faults import MAX_NAMES, as_value_error, shown
from ..checkpoints.shards import all_shards
from ..models.registry import families
from .kinds import kinds

TRANSFORMER_FOLDERS = {  # a transformer's folder in a model's folder: diffusers', the original's
    "transformer": ("transformer", "high_noise_model"),
    "transformer_2": ("transformer_2", "low_noise_model"),
}
STANDARD_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers', transformers'


def has_folder(root: Path, part: str) -> bool:
    """Whether a model's folder contains a folder for this part, whichever system wrote it."""
    return folder_of(root, part) is not None


def folder_of(root: Path, part: str) -> Path | None:
    """The folder of a part in a model's folder, whichever system wrote it."""
    further = [name for kind in kinds(part) for name in kind.part.folders]
    names = TRANSFORMER_FOLDERS.get(part, (part, *further))
    return next((root / name for name in names if (root / name).is_dir()), None)


def is_in_index(root: Path, part: str) -> bool:
    """Whether a diffusers pipeline's index lists this part; [null, null] stands for a part that is left out."""
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    entry = index.get(part)
    return any(entry) if isinstance(entry, list) else bool(entry)


def has_low_noise(path: str) -> bool:
    """Whether the folder `path` holds a low-noise expert. Raises ValueError if one is expected but missing."""
    root = Path(path).expanduser()
    found = has_folder(root, "transformer_2")
    if not found and (root / "high_noise_model").is_dir():
        raise ValueError(f"{root} has a high_noise_model, but no low_noise_model next to it. Download that too.")
    if is_in_index(root, "transformer_2") and not found:
        raise ValueError(f"{root / 'model_index.json'} lists a transformer_2, which is missing. Download that too.")
    return found


def is_original(folder: Path) -> bool:
    """Whether this folder holds a transformer in its authors' own layout, or its subfolders hold two of them."""
    return bool(originals_in(folder))


def originals_in(folder: Path) -> list[str]:
    """The names of the families whose transformers this folder, or its subfolders, hold in their authors' layout."""
    files = [folder / "config.json", folder / TRANSFORMER_FOLDERS["transformer"][1] / "config.json"]
    classes = [read_json(file).get("_class_name") for file in files if file.is_file()]
    return [one.name for one in families().values() if one.original_class and one.original_class in classes]


def shards_of(folder: Path, pattern: str = "*.safetensors") -> tuple[Path, ...]:
    """A component's weight files: those with a standard name of the libraries, else all files that match `pattern`."""
    standard = [name for name in STANDARD_NAMES if PurePath(name).match(pattern)]
    for index in _preferred(folder, f"{pattern}.index.json", [f"{name}.index.json" for name in standard]):
        with as_value_error(index, "its weight_map"):
            names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
            if strange := [name for name in names if not plain_file_name(name)]:
                raise ValueError(f"it names {strange[0]!r}, which is not the name of a file next to it")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise ValueError(f"{folder} lacks {listed_names(missing) or 'weights'}, see {index.name}. Download them.")
        return tuple(folder / name for name in names)
    shards = _preferred(folder, pattern, standard)
    if not shards:
        raise ValueError(f"{folder} has no {pattern.lstrip('*')} file. Download the weights next to config.json.")
    return shards


def loose_shards(folder: Path) -> tuple[Path, ...]:
    """The shards of one network in a folder without a config.json; empty if the folder holds anything else."""
    if (folder / "config.json").is_file():
        return ()
    return all_shards(tuple(sorted(folder.glob("*.safetensors"))))


def listed_names(names: Iterable[str]) -> str:
    """The first of these names, joined by commas."""
    names = sorted(names)
    return ", ".join(map(shown, names[:MAX_NAMES])) + (", ..." if len(names) > MAX_NAMES else "")


def _preferred(folder: Path, pattern: str, names: Iterable[str]) -> tuple[Path, ...]:
    """The first of `names` that is a file in `folder`, else all files that match the pattern."""
    for name in names:
        if (folder / name).is_file():
            return (folder / name,)
    return tuple(sorted(folder.glob(pattern)))
