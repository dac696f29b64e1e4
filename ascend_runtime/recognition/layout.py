"""Finds the files of a component by what is in them: the folders of diffusers, of a model's authors and of
MindSpeed-MM, and single files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..checkpoints.bounded import read_json
from ..checkpoints.configs import check_counts
from ..checkpoints.faults import shown
from ..checkpoints.msmodelslim import WEIGHTS, description_in, read_description
from ..checkpoints.paths import DEFAULTS, existing, file_of
from ..checkpoints.states import states
from ..models.family import TEXT_ENCODER, TRANSFORMER, VAE
from ..models.registry import families
from ..specs import VaeForm
from .component import Component
from .folders import FOLDERS, is_original, listed_names, loose_shards, shards_of
from .kinds import Kind, described, is_part, kinds, moved, own_name, part_of
from .mindspeed import latest_shards

DECIDING = ("model_index.json", "vae/config.json", "vae/latent_rgb.json")  # on any component of a diffusers folder
MOST_FILES = 8  # of torch.save in a folder, all of which are looked into; Wan's has 2
MOST_FAULTS = 4  # of these that an error quotes


def find_transformer(path: str, name: str = TRANSFORMER) -> Component:
    """A diffusion transformer: a file, a folder that holds one, or the one of that name in a model's folder.

    Raises ValueError that says what is there, and what was expected.
    """
    found = _find_transformer(existing(path), name)
    places = [file_of(path, DEFAULTS), *([found.root / DEFAULTS] if found.root else [])]
    own = next((file for file in places if file.exists()), None)
    return found if own is None else replace(found, defaults=own, decides=(*found.decides, own))


def find_text_encoders(path: str) -> list[Component]:
    """The text encoders of a model and their tokenizers, the main one first: a file, or those in the folder of
    diffusers or of a model's authors."""
    first = find_part(path, TEXT_ENCODER)
    return [first, *(find_part(path, part) for part in first.family.text_parts[1:])]


def find_vae(path: str) -> Component:
    """A VAE: a file, or the one in the folder of diffusers or of a model's authors."""
    return find_part(path, VAE)


def vae_form(path: str) -> VaeForm:
    """From the VAE's config only. Raises ValueError where there is no VAE."""
    found = find_vae(path)
    return found.family.vae_form(found.config)


def find_part(path: str, part: str) -> Component:
    """Any part of a model but its transformers. Raises ValueError as `find_component`."""
    found = _find_file(path, part) or find_component(path, part)
    found.part.check(found.config, found.config_file)
    return found


def find_component(path: str, name: str) -> Component:
    """The component `name` ("transformer", "vae", ...) of the diffusers folder `path`, or `path` if that is one.

    Raises ValueError that says what is missing and what was expected.
    """
    root = existing(path)
    folder = root / name if (root / name).is_dir() else root
    if not (folder / "config.json").is_file():
        if loose := sorted(root.glob("*.safetensors")):
            which = f"the file in it, {loose[0].name}" if len(loose) == 1 else f"one of its files, as {loose[0].name}"
            raise ValueError(f"{root} is no folder of a model: it has no {name}/config.json. Give {which}.")
        held = listed_names(entry.name for entry in root.iterdir()) or "nothing"
        published = " or ".join(one.repository for one in families().values())
        raise ValueError(
            f"{root} has no {name}/config.json; it holds {held}. Give a folder of diffusers or of the original, "
            f"such as a download of {published} from Hugging Face or ModelScope."
        )
    return _of_diffusers(folder, name)


def _of_diffusers(folder: Path, name: str, shards: tuple[Path, ...] | None = None) -> Component:
    """What the config.json in `folder` says, of these shards; None: those that lie there."""
    config = read_json(folder / "config.json")
    kind = _kind_in(config, name, folder)
    check_counts(config, folder / "config.json")
    pipeline = folder.parent
    decides = (folder / "config.json", *(pipeline / deciding for deciding in DECIDING))
    is_text = name.startswith(TEXT_ENCODER)
    tokenizer = pipeline / name.replace(TEXT_ENCODER, "tokenizer") if is_text else None
    return Component(kind, config, shards or shards_of(folder), folder, tokenizer=tokenizer, decides=decides)


def _kind_in(config: dict, name: str, folder: Path) -> Kind:
    """The network that a config is of: diffusers and transformers write it there, each in its way. Raises ValueError
    for one that is not known."""
    candidates = kinds(part_of(name))
    if not candidates:
        raise ValueError(f"{folder} would be a {name}, which no family of models here has.")
    for kind in candidates:
        key, wanted = kind.part.class_name
        if config.get(key) == wanted:
            return kind
    key, _ = candidates[0].part.class_name
    if key not in config:
        return candidates[0]
    wanted = " or ".join(f"a {kind.part.class_name[1]}" for kind in candidates)
    raise ValueError(f"{folder} holds a {shown(config[key])}; {wanted} is wanted here.")


def _find_transformer(root: Path, name: str) -> Component:
    if root.is_file():
        description = description_in(root.parent) if root.match(WEIGHTS) else None
        if description is not None:
            return _quantized(root.parent, (root,), description)
        _check_hidden(root)
        return _found(TRANSFORMER, (root,))
    inner = [root / folder for folder in FOLDERS[name] if (root / folder).is_dir()]
    folder = inner[0] if inner else root
    if shards := latest_shards(folder):
        return _found(TRANSFORMER, shards)
    if description := description_in(folder):
        named = any(folder.glob(WEIGHTS))
        return _quantized(folder, shards_of(folder, WEIGHTS) if named else shards_of(folder), description)
    if not is_original(folder):
        loose = loose_shards(folder)
        return _found(TRANSFORMER, loose) if loose else find_component(str(folder), name)
    return _original(folder, _found(TRANSFORMER, shards_of(folder)))


def _check_hidden(file: Path) -> None:
    """Raises ValueError for a file of a diffusers folder, given without it, whose config says what no shape shows, and
    what is otherwise than in all other files."""
    try:
        config = read_json(file.parent / "config.json")
    except ValueError:  # which is not asked for where a file is given
        return
    for kind in kinds(TRANSFORMER):
        key, wanted = kind.part.class_name
        hidden = {name: value for name, value in kind.part.hidden.items() if config.get(name, value) != value}
        if config.get(key) == wanted and hidden and is_part(TRANSFORMER, file):
            name, value = next(iter(hidden.items()))
            raise ValueError(
                f"{file} has {name} {shown(config[name])}, as the config.json next to it says, and a file without its "
                f"config is read with {value}. Give its folder: {file.parent}."
            )


def _original(folder: Path, found: Component) -> Component:
    """A transformer of the original, with what its config.json says and no shape shows."""
    file = folder / "config.json"
    config = found.family.with_original_config(found.config, read_json(file), file)
    return replace(found, config=config, decides=(*found.decides, file))


def _quantized(folder: Path, shards: tuple[Path, ...], file: Path) -> Component:
    """A transformer that msModelSlim wrote, of any system's names: its config is diffusers', or in the shapes."""
    description = read_description(file)
    if (folder / "config.json").is_file() and not is_original(folder):
        found = _of_diffusers(folder, TRANSFORMER, shards)
    else:
        found = _found(TRANSFORMER, shards)
        found = _original(folder, found) if is_original(folder) else found

    def rename(name: str, _: Path) -> str | None:
        return found.part.rename(name)

    return replace(found, rename=rename, decides=(*found.decides, file), quantized=description)


def _find_file(path: str, part: str) -> Component | None:
    """The component that is the file `path`, or a file of torch.save in the folder `path`, by its tensors."""
    root = existing(path)
    if root.is_file():
        return _found(part, (root,))
    if (root / part).is_dir():
        return None
    if shards := loose_shards(root):
        return _found(part, shards)
    files = sorted(root.glob("*.pth"))
    what = " or ".join(kind.what for kind in kinds(part))
    if len(files) > MOST_FILES:
        raise ValueError(f"{root} holds {len(files)} files of torch.save. Give the file that is the {what}.")
    unreadable = []
    for file in files:
        try:
            if is_part(part, file):
                return _found(part, (file,))
        except ValueError as error:  # it may be the one, or what nobody asks for
            unreadable.append(str(error))
    if unreadable or is_original(root):
        more = f"So it is with {len(unreadable) - MOST_FAULTS} more." if len(unreadable) > MOST_FAULTS else ""
        published = " or ".join(kind.part.published for kind in kinds(part))
        raise ValueError(
            f"{root} holds no {what}. Download {published} into it. "
            + " ".join((*unreadable[:MOST_FAULTS], more)).strip()
        )
    return None


def _found(part: str, shards: tuple[Path, ...]) -> Component:
    """A network without a config next to it: that is in the shapes. Raises ValueError where it is another network."""
    held = described(part, shards, states(shards))
    check_counts(held.config, shards[0])

    def rename(name: str, shard: Path) -> str | None:
        renamed = own_name(held.kind, held.prefix, name)
        return renamed and moved(held.kind, renamed, held.first_blocks[shards.index(shard)])

    own = None
    if part.startswith(TEXT_ENCODER):
        folder = held.kind.part.tokenizer_folder
        beside = folder and shards[0].parent / folder
        own = shards[0] if held.has_tokenizer else beside if beside and beside.is_dir() else None
    return Component(held.kind, held.config, shards, None, rename, tokenizer=own)
