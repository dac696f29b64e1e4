"""Finds a model's text encoders, in one folder or file or in two, their tokenizers, and the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from ..checkpoints.bounded import read_json
from ..checkpoints.paths import existing
from ..errors import coded_error
from ..models.family import TEXT_ENCODER, VISION, Family
from ..models.registry import families
from ..models.registry import family as family_named
from ..specs import TextEncoderSpec, VisionSpec
from .component import Component
from .folders import folder_of, loose_shards
from .kinds import Kind, is_kind, kinds
from .layout import find_part


def find_text_encoders(spec: TextEncoderSpec) -> list[Component]:
    """A model's text encoders with their tokenizers, the main one first.

    Raises ValueError if one is missing, or if two files hold the same one or those of two families.
    """
    found = _in_one(spec.path) if spec.path_2 is None else _in_two(spec.path, spec.path_2)
    given = (spec.tokenizer_path, spec.tokenizer_path_2)
    return [_with_tokenizer(one, tokenizer) for one, tokenizer in zip_longest(found, given[: len(found)])]


def find_vision(spec: VisionSpec) -> Component:
    """The vision tower in a folder or file. Raises ValueError if there is none."""
    root = existing(spec.path)
    if not any(_is_held(kind, root) for kind in kinds(VISION)):
        wanted = " or ".join(f"{kind.what}, such as {kind.part.published}" for kind in kinds(VISION))
        raise coded_error("AV-1414", f"{root} has no {wanted}. Give one as vision_path (vision_model_name in ComfyUI).")
    return find_part(spec.path, VISION)


def sees_images(folder: Path) -> bool:
    """Whether this folder holds a text encoder with a vision tower."""
    return any(_is_held(kind, folder) for kind in kinds(VISION))


def require_vision(family: Family) -> None:
    """Raises ValueError for a family whose prompts have no images."""
    if VISION not in family.parts:
        raise ValueError(f"The text encoder of {family.title} models reads no images. Encode the prompt without one.")


def _in_one(path: str) -> list[Component]:
    held = _held_by(path)
    if held and TEXT_ENCODER not in {kind.name for kind in held}:
        raise coded_error("AV-1414", _lacking(held[0], [path], TEXT_ENCODER))
    first = find_part(path, TEXT_ENCODER)
    further = first.family.text_parts[1:]
    for part in further:
        if held and Kind(first.family.name, part) not in held:
            raise coded_error("AV-1414", _lacking(first.kind, [path], part))
    return [first, *(find_part(path, part) for part in further)]


def _in_two(*paths: str) -> list[Component]:
    """From each path what the other one does not hold; of what both hold, that of the path that holds less."""
    held = {path: _held_by(path) or [find_part(path, TEXT_ENCODER).kind] for path in paths}
    mains = [(path, kind) for path in paths for kind in held[path] if kind.name == TEXT_ENCODER]
    if not mains:
        raise coded_error("AV-1414", _lacking(held[paths[0]][0], paths, TEXT_ENCODER))
    if len({kind.family for _, kind in mains}) > 1:
        both = " and ".join(f"{path} is a {kind.what}" for path, kind in mains)
        raise coded_error("AV-1414", f"{both}: they belong to different models. Give the encoders of one model.")
    family = family_named(mains[0][1].family)
    found: dict[str, str] = {}
    for part in family.text_parts:
        holders = [path for path in paths if Kind(family.name, part) in held[path]]
        if not holders:
            raise coded_error("AV-1414", _lacking(mains[0][1], paths, part))
        found[part] = min(reversed(holders), key=lambda path: len(held[path]))
    for path in paths:
        if path not in found.values():
            raise coded_error(
                "AV-1414",
                f"{path} is a {held[path][0].what}, which is not used: a {family.title} model reads "
                f"{' and '.join(f'a {family.parts[part].what}' for part in found)}. Remove it.",
            )
    return [find_part(path, part) for part, path in found.items()]


def _lacking(held: Kind, paths: Sequence[str], part: str) -> str:
    """The error for a part that is missing. held: what is there."""
    family = family_named(held.family)
    are = f"{paths[0]} is a" if len(set(paths)) == 1 else f"{' and '.join(paths)} are both a"
    other = family.parts[part]
    places = "in ComfyUI model_name_2, or the other name of Ascend Load Dual CLIP (Core)"
    option = "" if len(set(paths)) > 1 else f" as path_2 ({places})"
    return (
        f"{are} {held.what}. A {family.title} model needs two text encoders; the {other.what} is missing: give "
        f"{other.published}{option}."
    )


def _held_by(path: str) -> list[Kind]:
    """The text encoders in a folder or file, as far as their names or configs show it."""
    root = existing(path)
    known = [Kind(one.name, part) for one in families().values() for part in one.text_parts]
    return [kind for kind in known if _is_held(kind, root)]


def _is_held(kind: Kind, root: Path) -> bool:
    if root.is_file():
        return is_kind(kind, root)
    folder = folder_of(root, kind.name) or root
    if (folder / "config.json").is_file():
        return kind.part.config_in(read_json(folder / "config.json")) is not None
    return any(is_kind(kind, shard) for shard in loose_shards(root))


def _with_tokenizer(component: Component, given: str | None) -> Component:
    """With the tokenizer that was given, if the component's files have none."""
    if given is None or (component.tokenizer is not None and component.tokenizer.exists()):
        return component
    return replace(component, tokenizer=Path(given))
