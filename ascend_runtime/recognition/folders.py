"""The folders of models, by who wrote them: which parts lie in them, and in which files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

from ..checkpoints.bounded import plain_file_name, read_json
from ..checkpoints.faults import MAX_NAMES, shown, usable
from ..checkpoints.shards import all_shards
from ..models.registry import families

FOLDERS = {  # of a transformer within a model's: diffusers', the original's
    "transformer": ("transformer", "high_noise_model"),
    "transformer_2": ("transformer_2", "low_noise_model"),
}
STANDARD_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers', transformers'


def has_folder(root: Path, part: str) -> bool:
    """Whether a model's folder has one for this part, by whoever wrote it."""
    return any((root / name).is_dir() for name in FOLDERS.get(part, (part,)))


def is_in_index(root: Path, part: str) -> bool:
    """Whether a diffusers pipeline's index names this part; [null, null] stands for one that is left out."""
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    said = index.get(part)
    return any(said) if isinstance(said, list) else bool(said)


def has_low_noise(path: str) -> bool:
    """Whether the folder `path` holds a low-noise expert. Raises ValueError where there is to be one, and is none."""
    root = Path(path).expanduser()
    found = has_folder(root, "transformer_2")
    if not found and (root / "high_noise_model").is_dir():
        raise ValueError(f"{root} has a high_noise_model, but no low_noise_model next to it. Download that too.")
    if is_in_index(root, "transformer_2") and not found:
        raise ValueError(f"{root / 'model_index.json'} names a transformer_2, which is not there. Download that too.")
    return found


def is_original(folder: Path) -> bool:
    """Whether the transformer that a family's authors wrote lies in this folder, or the two in folders of it."""
    files = [folder / "config.json", folder / FOLDERS["transformer"][1] / "config.json"]
    classes = {one.original_class for one in families().values()} - {None}
    return any(file.is_file() and read_json(file).get("_class_name") in classes for file in files)


def shards_of(folder: Path, pattern: str = "*.safetensors") -> tuple[Path, ...]:
    """The weights of a component: those with the libraries' standard name where there are, else all that lie there.
    pattern: of their names."""
    standard = [name for name in STANDARD_NAMES if PurePath(name).match(pattern)]
    for index in _preferred(folder, f"{pattern}.index.json", [f"{name}.index.json" for name in standard]):
        with usable(index, "its weight_map"):
            names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
            if strange := [name for name in names if not plain_file_name(name)]:
                raise ValueError(f"it names {strange[0]!r}, which is no file next to it")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise ValueError(f"{folder} lacks {listed_names(missing) or 'weights'}, see {index.name}. Download them.")
        return tuple(folder / name for name in names)
    shards = _preferred(folder, pattern, standard)
    if not shards:
        raise ValueError(f"{folder} has no {pattern.lstrip('*')} file. Download the weights next to config.json.")
    return shards


def loose_shards(folder: Path) -> tuple[Path, ...]:
    """The shards of one network that lie in a folder without a config.json; none where other files lie there."""
    if (folder / "config.json").is_file():
        return ()
    return all_shards(tuple(sorted(folder.glob("*.safetensors"))))


def listed_names(names: Iterable[str]) -> str:
    """The first of them, in words."""
    names = sorted(names)
    return ", ".join(map(shown, names[:MAX_NAMES])) + (", ..." if len(names) > MAX_NAMES else "")


def _preferred(folder: Path, pattern: str, names: Iterable[str]) -> tuple[Path, ...]:
    """The file with one of `names` where it lies in `folder`, else all that fit the pattern."""
    for name in names:
        if (folder / name).is_file():
            return (folder / name,)
    return tuple(sorted(folder.glob(pattern)))
