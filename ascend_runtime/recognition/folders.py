"""Model folders as each system writes them: which parts they contain, and in which files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

from ..checkpoints.bounded import plain_file_name, read_json
from ..checkpoints.faults import MAX_NAMES, as_value_error, shown
from ..checkpoints.shards import all_shards
from ..errors import coded_error
from ..models.family import TRANSFORMER, TRANSFORMER_2, Family, OriginalLayout
from ..models.registry import families

TRANSFORMERS = (TRANSFORMER, TRANSFORMER_2)
NOT_IN_BLOCKS = "non_block.safetensors"  # LightX2V's name of what is in no block
SINGLE_FILES = (".safetensors", ".gguf")  # the endings of files that are a whole network without a config.json
STANDARD_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers', transformers'


def folder_of(root: Path, part: str) -> Path | None:
    """The folder of a part in a model's folder, whichever system wrote it; None if there is none.

    Raises ValueError for a download of several models that have such a part.
    """
    if (root / part).is_dir():
        return root / part
    for layout in _layouts():
        names = (part, *layout.folders.get(part, ()))
        for bases in ([root], _models_in(root, layout), [root.parent] if _is_model(root, layout) else []):
            found = [next(path for path in paths if path.is_dir()) for paths in
                     ([base / name for name in names] for base in bases) if any(map(Path.is_dir, paths))]  # fmt: skip
            if len(found) > 1:
                models = listed_names(path.parent.name for path in found)
                raise coded_error("AV-1310", f"{root} holds several models: {models}. Give the folder of one.")
            if found:
                return found[0]
    return None


def _layouts() -> list[OriginalLayout]:
    return [one.layout for one in families().values()]


def _models_in(root: Path, layout: OriginalLayout) -> list[Path]:
    return sorted(root.glob(layout.models)) if layout.models else []


def _is_model(root: Path, layout: OriginalLayout) -> bool:
    """Whether a folder is that of a model in a download of this layout, by its name."""
    return bool(layout.models) and root.resolve().match(layout.models)


def has_folder(root: Path, part: str) -> bool:
    """Whether a model's folder contains a folder for this part, whichever system wrote it."""
    try:
        return folder_of(root, part) is not None
    except ValueError:
        return True


def is_transformers_folder(root: Path) -> bool:
    """Whether a folder is that of a transformer in its authors' layout, by its name."""
    return any(root.name in layout.folders.get(part, ()) for layout in _layouts() for part in TRANSFORMERS)


def original_file(folder: Path, part: str) -> Path | None:
    """The file with the weights of a part in this folder, in its authors' own layout; None if there is none."""
    for layout in _layouts():
        if (folder / "config.json").is_file() and _class_in(folder) != layout.classes.get(part):
            continue
        if found := next((file for file in _files_of(layout, folder, part) if file.is_file()), None):
            return found
    return None


def _files_of(layout: OriginalLayout, folder: Path, part: str) -> list[Path]:
    return [folder / name for name in layout.files.get(part, ())]


def _class_in(folder: Path) -> object:
    """The class that a folder's config names; None if there is none."""
    file = folder / "config.json"
    return read_json(file).get("_class_name") if file.is_file() else None


def is_in_index(root: Path, part: str) -> bool:
    """Whether a diffusers pipeline's index lists this part; [null, null] stands for a part that is left out."""
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    entry = index.get(part)
    return any(entry) if isinstance(entry, list) else bool(entry)


def has_low_noise(path: str) -> bool:
    """Whether the folder `path` holds a low-noise expert. Raises ValueError if one is expected but missing."""
    root = Path(path).expanduser()
    found = has_folder(root, TRANSFORMER_2)
    if found:
        return True
    for layout in _layouts():
        there = next((name for name in layout.folders.get(TRANSFORMER, ()) if (root / name).is_dir()), None)
        if there and TRANSFORMER_2 in layout.folders:
            other = layout.folders[TRANSFORMER_2][0]
            raise coded_error("AV-1307", f"{root} has a {there}, but no {other} next to it. Download that too.")
    if is_in_index(root, TRANSFORMER_2):
        raise coded_error(
            "AV-1307", f"{root / 'model_index.json'} lists a transformer_2, which is missing. Download that too."
        )
    return False


def original_family(folder: Path) -> Family | None:
    """The family whose authors' own layout a folder has: it holds a part, or its subfolders hold a model's; else
    None."""
    for one in families().values():
        layout = one.layout
        named = layout.classes.get(TRANSFORMER)
        second = [folder / name for name in layout.folders.get(TRANSFORMER_2, ())]
        if named and any(_class_in(place) == named for place in (folder, *second)):
            return one
        places = [folder, *(base / name for base in (folder, *_models_in(folder, layout))
                            for name in layout.folders.get(TRANSFORMER, ()))]  # fmt: skip
        if any(file.is_file() for place in places for file in _files_of(layout, place, TRANSFORMER)):
            return one
    return None


def loose_files(folder: Path) -> list[Path]:
    """The weights in a model's folder itself, as authors lay them out: any of them may hold any part."""
    return sorted({file for layout in _layouts() if layout.loose for file in folder.glob(layout.loose)})


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
            raise coded_error(
                "AV-1307", f"{folder} lacks {listed_names(missing) or 'weights'}, see {index.name}. Download them."
            )
        return tuple(folder / name for name in names)
    shards = _preferred(folder, pattern, standard)
    if not shards:
        raise coded_error(
            "AV-1307", f"{folder} has no {pattern.lstrip('*')} file. Download the weights next to config.json."
        )
    return shards


def loose_shards(folder: Path) -> tuple[Path, ...]:
    """The shards of one network in a folder without a config.json; empty if the folder holds anything else. LightX2V
    writes one file for each block, one for all else, and an index: without it, missing blocks would not show."""
    if (folder / "config.json").is_file():
        return ()
    if (folder / NOT_IN_BLOCKS).is_file():
        if any(folder.glob("*.index.json")):
            return shards_of(folder)
        raise coded_error(
            "AV-1307",
            f"{folder} has files of single blocks, and no .safetensors.index.json that lists them. Download it too.",
        )
    found = (all_shards(tuple(sorted(folder.glob(f"*{suffix}")))) for suffix in SINGLE_FILES)
    return next(filter(None, found), ())


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
