"""Where the files of a component lie, told by what is in them: the folders of diffusers, of the original and of
MindSpeed-MM, and single files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from ..vae_form import VaeForm
from .bounded import plain_file_name, read_json
from .configs import HEAD_DIM, check_colours, check_counts, check_vae
from .faults import MAX_NAMES, shown, usable
from .fused import Split
from .kinds import KINDS, described, is_kind, moved, own_name
from .mindspeed import latest_shards
from .msmodelslim import WEIGHTS, Description, description_in, read_description
from .paths import DEFAULTS, existing, file_of
from .states import files_of, states
from .variants import all_shards

CLASSES = {  # of component: the key of its config that tells, and what it says
    "transformer": ("_class_name", "WanTransformer3DModel"),
    "text_encoder": ("model_type", "umt5"),
    "vae": ("_class_name", "AutoencoderKLWan"),
}
ORIGINAL_TRANSFORMER = "WanModel"  # what the original's config.json says
FOLDERS = {  # of a transformer within a model's, by who wrote it: diffusers, the original
    "transformer": ("transformer", "high_noise_model"),
    "transformer_2": ("transformer_2", "low_noise_model"),
}
DECIDING = ("model_index.json", "vae/config.json", "vae/latent_rgb.json")  # on any component of a diffusers folder
TOKENIZER = Path("google") / "umt5-xxl"  # beside the original's text encoder
Rename = Callable[[str, Path], str | None]  # a parameter's name by a tensor's, and its shard; None: it is none
MOST_FILES = 8  # of torch.save in a folder, all of which are looked into; the original's has 2
MOST_FAULTS = 4  # of these that an error quotes
STANDARD_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers', transformers'


def _same(name: str, _: Path) -> str:
    return name


@dataclass(frozen=True)
class Component:
    """A network on disk: its config, its shards in the order to be read, and what their tensors are called.

    A shard is a file, or the folder of a distributed checkpoint.
    """

    config: dict
    shards: tuple[Path, ...]
    folder: Path | None  # of a diffusers component; None for any other
    rename: Rename = _same
    tokenizer: Path | None = None  # of a text encoder: its folder, or the file that has it; None: it is nowhere
    beside: tuple[Path, ...] = ()  # files that say how it is used, whether they are there or not
    quantized: Description | None = None  # which layers lie there quantized; None: all lie as numbers
    defaults: Path | None = None  # the file that says what a transformer is run with; None: there is none
    split: Split | None = None  # which parameters a tensor holds in its rows, by what `rename` makes of its name

    @property
    def root(self) -> Path | None:
        """The diffusers pipeline that it belongs to; None where it belongs to none."""
        return self.folder and self.folder.parent

    @property
    def fingerprint(self) -> tuple:
        """Changes when a file on disk does: the weights, and what says how to use them."""
        told_by = self.beside if self.tokenizer is None else (*self.beside, self.tokenizer)
        return states((*filter(Path.exists, told_by), *self.shards))

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in files_of(self.shards))


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
        held = _names(entry.name for entry in root.iterdir()) or "nothing"
        raise ValueError(
            f"{root} has no {name}/config.json; it holds {held}. Give a folder of diffusers or of the original, "
            "such as a download of Wan-AI/Wan2.2-T2V-A14B-Diffusers from Hugging Face or ModelScope."
        )
    return _of_diffusers(folder, name)


def _names(names: Iterable[str]) -> str:
    """The first of them, in words."""
    names = sorted(names)
    return ", ".join(map(shown, names[:MAX_NAMES])) + (", ..." if len(names) > MAX_NAMES else "")


def _of_diffusers(folder: Path, name: str, shards: tuple[Path, ...] | None = None) -> Component:
    """What the config.json in `folder` says, of these shards; None: those that lie there."""
    config = read_json(folder / "config.json")
    _check_kind(config, name, folder)
    check_counts(config, folder / "config.json")
    pipeline = folder.parent
    beside = (folder / "config.json", *(pipeline / deciding for deciding in DECIDING))
    tokenizer = pipeline / "tokenizer" if name == "text_encoder" else None
    return Component(config, shards or _shards_of(folder), folder, tokenizer=tokenizer, beside=beside)


def find_transformer(path: str, name: str = "transformer") -> Component:
    """A diffusion transformer: a file, a folder that holds one, or the one of that name in a model's folder.

    Raises ValueError that says what is there, and what was expected.
    """
    found = _find_transformer(existing(path), name)
    places = [file_of(path, DEFAULTS), *([found.root / DEFAULTS] if found.root else [])]
    own = next((file for file in places if file.exists()), None)
    return found if own is None else replace(found, defaults=own, beside=(*found.beside, own))


def _find_transformer(root: Path, name: str) -> Component:
    if root.is_file():
        described = description_in(root.parent) if root.match(WEIGHTS) else None
        if described is not None:
            return _quantized(root.parent, (root,), described)
        _check_heads(root)
        return _found("transformer", (root,))
    inner = [root / folder for folder in FOLDERS[name] if (root / folder).is_dir()]
    folder = inner[0] if inner else root
    if shards := latest_shards(folder):
        return _found("transformer", shards)
    if described := description_in(folder):
        named = any(folder.glob(WEIGHTS))
        return _quantized(folder, _shards_of(folder, WEIGHTS) if named else _shards_of(folder), described)
    if not is_original(folder):
        loose = _loose_shards(folder)
        return _found("transformer", loose) if loose else find_component(str(folder), name)
    return _original(folder, _found("transformer", _shards_of(folder)))


def _check_heads(file: Path) -> None:
    """Raises ValueError for a file of a diffusers folder, given without it, whose heads are not those of all other
    files: they are nowhere in its shapes."""
    try:
        config = read_json(file.parent / "config.json")
    except ValueError:  # which is not asked for where a file is given
        return
    key, wanted = CLASSES["transformer"]
    width = config.get("attention_head_dim", HEAD_DIM)
    if config.get(key) == wanted and width != HEAD_DIM and is_kind("transformer", file):
        raise ValueError(
            f"{file} has heads of {shown(width)} channels, as the config.json next to it says, and a file without its "
            f"config is read with heads of {HEAD_DIM}. Give its folder: {file.parent}."
        )


def _original(folder: Path, found: Component) -> Component:
    """A transformer of the original, with the heads that its config.json says."""
    heads, width = (found.config[key] for key in ("num_attention_heads", "attention_head_dim"))
    told = read_json(folder / "config.json").get("num_heads", heads)
    if type(told) is not int or told < 1 or heads * width % told:
        raise ValueError(
            f"{folder / 'config.json'} says num_heads {shown(repr(told))}, which does not cut the {heads * width} "
            f"channels of {found.shards[0].name} into heads. Download it again."
        )
    shape = {"num_attention_heads": told, "attention_head_dim": heads * width // told}
    beside = (*found.beside, folder / "config.json")
    return replace(found, config=found.config | shape, beside=beside)


def _quantized(folder: Path, shards: tuple[Path, ...], described: Path) -> Component:
    """A transformer that msModelSlim wrote, of any system's names: its config is diffusers', or in the shapes."""
    description = read_description(described)
    if (folder / "config.json").is_file() and not is_original(folder):
        found = _of_diffusers(folder, "transformer", shards)
    else:
        found = _found("transformer", shards)
        found = _original(folder, found) if is_original(folder) else found

    def rename(name: str, _: Path) -> str | None:
        return KINDS["transformer"].rename(name)

    return replace(found, rename=rename, beside=(*found.beside, described), quantized=description)


def is_original(folder: Path) -> bool:
    """Whether the original's transformer lies in this folder, or its two in folders of it."""
    told = [folder / "config.json", folder / FOLDERS["transformer"][1] / "config.json"]
    return any(file.is_file() and read_json(file).get("_class_name") == ORIGINAL_TRANSFORMER for file in told)


def find_text_encoder(path: str) -> Component:
    """A UMT5 and its tokenizer: a file, or the one in the folder of diffusers or of the original."""
    found = _find_file(path, "text_encoder")
    return found or find_component(path, "text_encoder")


def find_vae(path: str) -> Component:
    """A VAE: a file, or the one in the folder of diffusers or of the original."""
    found = _find_file(path, "vae") or find_component(path, "vae")
    where = found.folder / "config.json" if found.folder else found.shards[0]
    check_colours(found.config, where)
    check_vae(found.config, where)
    return found


def _find_file(path: str, kind: str) -> Component | None:
    """The component that is the file `path`, or a file of torch.save in the folder `path`: told by its tensors."""
    root = existing(path)
    if root.is_file():
        return _found(kind, (root,))
    if (root / kind).is_dir():
        return None
    if shards := _loose_shards(root):
        return _found(kind, shards)
    files = sorted(root.glob("*.pth"))
    if len(files) > MOST_FILES:
        what = KINDS[kind].what
        raise ValueError(f"{root} holds {len(files)} files of torch.save. Give the file that is the {what}.")
    unreadable = []
    for file in files:
        try:
            if is_kind(kind, file):
                return _found(kind, (file,))
        except ValueError as error:  # it may be the one, or what nobody asks for
            unreadable.append(str(error))
    if unreadable or is_original(root):
        more = f"So it is with {len(unreadable) - MOST_FAULTS} more." if len(unreadable) > MOST_FAULTS else ""
        raise ValueError(
            f"{root} holds no {KINDS[kind].what}. Download {KINDS[kind].published} into it. "
            + " ".join((*unreadable[:MOST_FAULTS], more)).strip()
        )
    return None


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
        raise ValueError(f"{root} has a high_noise_model, but no low_noise_model beside it. Download that too.")
    if is_in_index(root, "transformer_2") and not found:
        raise ValueError(f"{root / 'model_index.json'} names a transformer_2, which is not there. Download that too.")
    return found


def vae_form(path: str) -> VaeForm:
    """From the VAE's config alone. Raises ValueError where there is no VAE."""
    config = find_vae(path).config
    spatial, temporal = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    return VaeForm(config.get("z_dim", 16), spatial, temporal)


def _check_kind(config: dict, name: str, folder: Path) -> None:
    """diffusers and transformers write into a config what network it is of, each in its way."""
    key, wanted = CLASSES[name.removesuffix("_2")]
    if config.get(key, wanted) != wanted:
        raise ValueError(f"{folder} holds a {shown(config[key])}; a {wanted} is wanted here.")


def _shards_of(folder: Path, pattern: str = "*.safetensors") -> tuple[Path, ...]:
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
            raise ValueError(f"{folder} lacks {_names(missing) or 'weights'}, see {index.name}. Download them.")
        return tuple(folder / name for name in names)
    shards = _preferred(folder, pattern, standard)
    if not shards:
        raise ValueError(f"{folder} has no {pattern.lstrip('*')} file. Download the weights beside config.json.")
    return shards


def _loose_shards(folder: Path) -> tuple[Path, ...]:
    """The shards of one network that lie in a folder without a config.json; none where other files lie there."""
    if (folder / "config.json").is_file():
        return ()
    return all_shards(tuple(sorted(folder.glob("*.safetensors"))))


def _preferred(folder: Path, pattern: str, names: Iterable[str]) -> tuple[Path, ...]:
    """The file with one of `names` where it lies in `folder`, else all that fit the pattern."""
    for name in names:
        if (folder / name).is_file():
            return (folder / name,)
    return tuple(sorted(folder.glob(pattern)))


def _found(kind: str, shards: tuple[Path, ...]) -> Component:
    """A network beside which no config lies: it is in the shapes. Raises ValueError where it is another network."""
    held = described(kind, shards, states(shards))
    check_counts(held.config, shards[0])

    def rename(name: str, shard: Path) -> str | None:
        renamed = own_name(KINDS[kind], held.prefix, name)
        return renamed and moved(renamed, held.first_blocks[shards.index(shard)])

    beside = shards[0].parent / TOKENIZER
    own = shards[0] if held.has_tokenizer else beside if beside.is_dir() else None
    return Component(held.config, shards, None, rename, tokenizer=own if kind == "text_encoder" else None)
