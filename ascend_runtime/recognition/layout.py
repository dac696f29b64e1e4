"""Finds a component's files by their content: in folders of diffusers, of a model's authors or of MindSpeed-MM, or in
single files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..checkpoints.bounded import read_json
from ..checkpoints.configs import check_counts
from ..checkpoints.faults import shown
from ..checkpoints.msmodelslim import WEIGHTS_PATTERN, description_in, read_description
from ..checkpoints.paths import DEFAULTS, existing, file_of
from ..checkpoints.states import states
from ..checkpoints.tokenizers.bpe import VOCABULARY
from ..checkpoints.tokenizers.steps import JSON
from ..errors import coded_error
from ..models.family import TEXT_ENCODER, TRANSFORMER, VAE
from ..models.registry import families
from ..specs import VaeForm
from .component import Component
from .folders import (
    SINGLE_FILES,
    folder_of,
    listed_names,
    loose_files,
    loose_shards,
    original_family,
    original_file,
    shards_of,
)
from .kinds import Kind, is_kind, is_part, kinds, own_name, part_of, recognise, renumbered
from .mindspeed import latest_shards

DECIDING = ("model_index.json", "vae/config.json", "vae/latent_rgb.json")  # for all components of a diffusers folder
MAX_TORCH_FILES = 8  # torch.save files in a folder, all of which are opened; Wan's folder has 2
MAX_FAULTS = 4  # unreadable files that an error quotes


def find_transformer(path: str, name: str = TRANSFORMER) -> Component:
    """A diffusion transformer: a file, a folder that holds one, or the transformer `name` in a model's folder.

    Raises ValueError, which says what was found and what was expected.
    """
    found = _find_transformer(existing(path), name)
    places = [file_of(path, DEFAULTS), *([found.root / DEFAULTS] if found.root else [])]
    own = next((file for file in places if file.exists()), None)
    return found if own is None else replace(found, defaults=own, decides=(*found.decides, own))


def find_vae(path: str) -> Component:
    """A VAE: a file, or the VAE in a folder of diffusers or of the model's authors."""
    return find_part(path, VAE)


def vae_form(path: str) -> VaeForm:
    """The form of a VAE's latents, from its config only. Raises ValueError if there is no VAE."""
    found = find_vae(path)
    return found.family.vae_form(found.config)


def find_part(path: str, part: str) -> Component:
    """A part of a model other than a transformer. Raises ValueError like `find_component`."""
    found = _find_file(path, part) or _find_original(path, part) or find_component(path, part)
    found.part.check(found.config, found.config_file)
    return found


def find_component(path: str, name: str) -> Component:
    """The component `name` ("transformer", "vae", ...) of the diffusers folder `path`, or the component folder `path`.

    Raises ValueError, which says what is missing and what was expected.
    """
    root = existing(path)
    folder = folder_of(root, name) or root
    if not (folder / "config.json").is_file():
        if loose := sorted(file for suffix in SINGLE_FILES for file in root.glob(f"*{suffix}")):
            which = f"its file {loose[0].name}" if len(loose) == 1 else f"one of its files, such as {loose[0].name}"
            raise coded_error("AV-1301", f"{root} is not a model's folder: it has no {name}/config.json. Give {which}.")
        held = listed_names(entry.name for entry in root.iterdir()) or "nothing"
        published = " or ".join(one.repository for one in families().values())
        raise coded_error(
            "AV-1301",
            f"{root} has no {name}/config.json; it holds {held}. Give a folder of diffusers or of the original model, "
            f"such as a download of {published} from Hugging Face or ModelScope.",
        )
    return _of_diffusers(folder, name)


def _of_diffusers(folder: Path, name: str, shards: tuple[Path, ...] | None = None) -> Component:
    """The component that the config.json in `folder` describes. shards: None for those in `folder`."""
    config = read_json(folder / "config.json")
    shards = shards or shards_of(folder)
    kind = _kind_in(config, name, folder, shards)
    check_counts(config, folder / "config.json")
    pipeline = folder.parent
    decides = (folder / "config.json", *(pipeline / deciding for deciding in DECIDING))
    is_text = name.startswith(TEXT_ENCODER)
    tokenizer = _tokenizer_of(folder, name) if is_text else None
    own = Component(kind, kind.part.config_in(config) or config, shards, folder,
                    tokenizer=tokenizer, decides=decides)  # fmt: skip
    if kind.part.inner_config is None:
        return own
    return replace(own, rename=_found(kind.name, own.shards).rename)


def _tokenizer_of(folder: Path, name: str) -> Path:
    """The tokenizer's folder next to a text encoder's, as diffusers writes it, or that folder itself, as the original
    has it."""
    neighbour = folder.parent / name.replace(TEXT_ENCODER, "tokenizer")
    is_inside = any((folder / one).is_file() for one in (JSON, VOCABULARY))
    return folder if is_inside and not neighbour.is_dir() else neighbour


def _kind_in(config: dict, name: str, folder: Path, shards: Iterable[Path]) -> Kind:
    """The kind of network that a config names, by diffusers' or transformers' key; without one, the kind that the first
    of the shards holds that can be recognised. Raises ValueError for an unknown one."""
    candidates = kinds(part_of(name))
    if not candidates:
        raise coded_error("AV-1308", f"{folder} is read as a {name}, but no supported model family has such a part.")
    for kind in candidates:
        if kind.part.config_in(config) is not None:
            return kind
    named = next((config[key] for key, _ in (kind.part.class_name for kind in candidates) if key in config), None)
    if named is None:
        return next((kind for kind in candidates for file in shards if is_kind(kind, file)), candidates[0])
    wanted = " or ".join(f"a {kind.part.class_name[1]}" for kind in candidates)
    what = next((text for kind in candidates for name, text in kind.part.other_classes.items() if name == named), "")
    what = f" That is {what}, which is not supported." if what else ""
    others = [kind.part.class_name[1] for kind in kinds()]
    code = "AV-1311" if what else "AV-1402" if named in others else "AV-1308"
    raise coded_error(code, f"{folder} holds a {shown(named)}; it must hold {wanted}.{what}")


def _find_transformer(root: Path, name: str) -> Component:
    if root.is_file():
        description = description_in(root.parent) if root.match(WEIGHTS_PATTERN) else None
        if description is not None:
            return _quantized(root.parent, (root,), description)
        _check_hidden(root)
        return _found(TRANSFORMER, (root,))
    folder = folder_of(root, name) or root
    if shards := latest_shards(folder):
        return _found(TRANSFORMER, shards)
    if description := description_in(folder):
        named = any(folder.glob(WEIGHTS_PATTERN))
        return _quantized(folder, shards_of(folder, WEIGHTS_PATTERN) if named else shards_of(folder), description)
    if file := original_file(folder, name):
        return _found(TRANSFORMER, (file,))
    if original_family(folder) is None:
        loose = loose_shards(folder)
        return _found(TRANSFORMER, loose) if loose else find_component(str(folder), name)
    return _original(folder, _found(TRANSFORMER, shards_of(folder)))


def _check_hidden(file: Path) -> None:
    """Raises ValueError for a single file of a diffusers folder if its config has a setting that the shapes do not
    show, with another value than a single file is read with."""
    try:
        config = read_json(file.parent / "config.json")
    except ValueError:  # a single file needs no config
        return
    for kind in kinds(TRANSFORMER):
        key, wanted = kind.part.class_name
        if config.get(key) != wanted or not is_kind(kind, file):
            continue
        own = _config_of(file)
        for name, default in kind.part.hidden.items():
            value = own.get(name, default)
            if _as_list(config.get(name, value)) != _as_list(value):
                raise coded_error(
                    "AV-1311",
                    f"The config.json next to {file} sets {name} to {shown(config[name])}, but a single file is read "
                    f"without its config, with {value}. Give its folder: {file.parent}.",
                )


def _config_of(file: Path) -> dict:
    """The config of a transformer's file, read off its shapes; empty if they do not fit each other."""
    try:
        return _found(TRANSFORMER, (file,)).config
    except ValueError:
        return {}


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _original(folder: Path, found: Component) -> Component:
    """A transformer in its authors' layout, with the settings of its config.json that the shapes do not show."""
    file = folder / "config.json"
    config = found.family.with_original_config(found.config, read_json(file), file)
    return replace(found, config=config, decides=(*found.decides, file))


def _quantized(folder: Path, shards: tuple[Path, ...], file: Path) -> Component:
    """A transformer that msModelSlim wrote, with any system's names. Its config is diffusers', or read off the
    shapes."""
    description = read_description(file).with_steps(shards)
    original = original_family(folder) is not None
    if (folder / "config.json").is_file() and not original:
        found = _of_diffusers(folder, TRANSFORMER, shards)
    else:
        found = _found(TRANSFORMER, shards)
        found = _original(folder, found) if original else found

    def rename(name: str, _: Path) -> str | None:
        return found.part.rename(name)

    return replace(found, rename=rename, decides=(*found.decides, file), quantized=description)


def _find_file(path: str, part: str) -> Component | None:
    """The component in the file `path`, or in a loose file in the folder `path`, by its tensors."""
    root = existing(path)
    if root.is_file():
        return _found(part, (root,))
    if folder_of(root, part) is not None:
        return None
    if shards := loose_shards(root):
        return _found(part, shards)
    files, family = loose_files(root), original_family(root)
    wanted = [kind for kind in kinds(part) if family is None or kind.family == family.name]
    what = " or ".join(kind.what for kind in wanted)
    if len(files) > MAX_TORCH_FILES:
        raise coded_error("AV-1310", f"{root} holds {len(files)} torch.save files. Give the file of the {what}.")
    unreadable = []
    for file in files:
        try:
            if is_part(part, file):
                return _found(part, (file,))
        except ValueError as error:  # the file may be the wanted one, or an unrelated one
            unreadable.append(str(error))
    if unreadable or family is not None:
        more = f"{len(unreadable) - MAX_FAULTS} more files are unreadable." if len(unreadable) > MAX_FAULTS else ""
        published = " or ".join(kind.part.published for kind in wanted)
        raise coded_error(
            "AV-1307",
            " ".join(
                (f"{root} holds no {what}. Download {published} into it.", *unreadable[:MAX_FAULTS], more)
            ).strip(),
        )
    return None


def _find_original(path: str, part: str) -> Component | None:
    """The component in a folder of its authors, whose config may say less than the shapes."""
    root = existing(path)
    folder = folder_of(root, part) or root
    file = original_file(folder, part)
    return _found(part, (file,)) if file else None


def _found(part: str, shards: tuple[Path, ...]) -> Component:
    """A network without a config next to it, which is read off the shapes. Raises ValueError for another network."""
    held = recognise(part, shards, states(shards))
    check_counts(held.config, shards[0])

    def rename(name: str, shard: Path) -> str | None:
        renamed = own_name(held.kind, held.prefix, name)
        return renamed and renumbered(held.kind, renamed, held.first_blocks[shards.index(shard)])

    own = None
    if part.startswith(TEXT_ENCODER):
        folder = held.kind.part.tokenizer_folder
        neighbour = folder and shards[0].parent / folder
        own = shards[0] if held.has_tokenizer else neighbour if neighbour and neighbour.is_dir() else None
    return Component(held.kind, held.config, shards, None, rename, tokenizer=own)
