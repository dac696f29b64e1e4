"""What nodes attach to a MODEL or a CONDITIONING that cannot reach the ranks: refused by name, with what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

logger = logging.getLogger(__name__)

NETWORK = "diffusion_model"  # the attribute of core's models
CORE = "load the model with core's Load Diffusion Model"
INSTEAD = f"Take that node out of the graph, or {CORE}."
# Options of core's samplers and networks that change nothing in the network, or that it reads here.
KNOWN_OPTIONS = {
    "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "patches", "patches_replace",
    "optimized_attention_override", "rope_options", "easycache", "context_window", "total_blocks", "block_type",
    "block_index", "prefetch_dynamic_vbars", "multigpu_thread_device", "img_slice", "block", "to_load_options",
}  # fmt: skip
# Entries of a CONDITIONING that only networks without ranks read, and what they are.
CONDITIONING = (
    ("control", "a ControlNet"),
    ("gligen", "GLIGEN"),
    ("vace_frames", "frames for VACE"),
    ("camera_conditions", "a camera's path"),
    ("audio_embed", "sound"),
    ("face_video_pixels", "a video of a face"),
    ("pose_video_latent", "a video of poses"),
    ("control_video", "a control video for sound to video"),
    ("reference_motion", "a motion to continue"),
)
_warned: set[str] = set()


def of_patcher(patcher: ModelPatcher) -> None:
    """Raises ValueError for what is attached to the network's layers."""
    for name, value in patcher.object_patches.items():
        if name.split(".")[0] == NETWORK and not _is_compiled(value, patcher.get_model_object(NETWORK)):
            _refuse(f"{origin(value)} in the place of {name}")
    for key in patcher.injections:
        _refuse(f"the injection {key!r}")
    for name, wrappers in patcher.weight_wrapper_patches.items():
        _refuse(f"{origin(wrappers[0])} around the weight {name}")


def of_conditioning(conds: dict[str, list[dict]]) -> None:
    """Raises ValueError for what the network could not read. conds: core's, by the name of the input."""
    for name, parts in conds.items():
        for part in parts:
            for entry, what in CONDITIONING:
                if part.get(entry) is not None:
                    raise ValueError(
                        f"The {name} conditioning carries {what} ({entry!r}), which no network on the ranks reads. "
                        f"Take the node that adds it out of the graph, or {CORE}."
                    )


def of_options(options: dict[str, Any]) -> None:
    """Raises ValueError for what nodes want inside the network; warns once of options that nobody here knows."""
    for place, functions in (options.get("patches") or {}).items():
        if functions:
            _refuse(f"{origin(functions[0])} as {place!r}")
    for place, functions in (options.get("patches_replace") or {}).items():
        if functions and place != "dit":
            _refuse(f"{origin(next(iter(functions.values())))} in the place of {place!r}")
    if options.get("optimized_attention_override") is not None:
        _refuse(f"another attention ({origin(options['optimized_attention_override'])})")
    if options.get("rope_options") is not None:
        _refuse("other positions of the video's tokens (rope_options, as of ScaleROPE)")
    _warn_once(set(map(str, options)) - KNOWN_OPTIONS)


def tensors_of(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs of the network. Raises ValueError for those that are not tensors."""
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The conditioning makes the network's input {name!r} ({type(value).__name__}), which no network on "
                f"the ranks reads. Take the node that adds it out of the graph, or {CORE}."
            )
    return dict(inputs)


def skipped_blocks(options: dict[str, Any], network: torch.nn.Module) -> tuple[int, ...]:
    """The blocks that nodes such as SkipLayerGuidanceDiT leave out, in one numbering. Raises ValueError for functions
    that do something else in a block's place."""
    replaced = (options.get("patches_replace") or {}).get("dit") or {}
    firsts = len(getattr(network, "double_blocks", None) or getattr(network, "blocks", ()))
    counts = {"double_block": (0, firsts), "single_block": (firsts, len(getattr(network, "single_blocks", ())))}
    skipped = []
    for (kind, number, *_), function in replaced.items():
        start, count = counts.get(kind, (0, 0))
        if number < count and _skips(function, f"{kind} {number}", options):
            skipped.append(start + number)
    return tuple(sorted(skipped))


def origin(function: Any) -> str:
    """Where a function or object comes from, so that users find the node that attached it."""
    named = function if hasattr(function, "__qualname__") else type(function)
    module = str(named.__module__).rpartition("/")[2]  # ComfyUI names a pack's module by its path
    return f"{module}.{named.__qualname__}"


def _skips(function: Callable, name: str, options: dict[str, Any]) -> bool:
    """Whether a function that stands in a block's place leaves the block out. It gets stand-ins for tensors, and must
    return those that it got, or those that the block returned for them."""
    given = {"img": torch.empty(0), "txt": torch.empty(0)}
    made = {"img": torch.empty(0), "txt": torch.empty(0)}
    rest = ("vec", "pe", "attention_mask", "modulation_dims", "modulation_dims_img", "modulation_dims_txt")
    arguments = {**given, **dict.fromkeys(rest), "transformer_options": options}
    calls = []

    def block(passed: dict[str, Any]) -> dict[str, Tensor]:
        calls.append(all(passed.get(key) is value for key, value in arguments.items()))
        return dict(made)

    try:
        result = function(dict(arguments), {"original_block": block})
    except Exception as error:  # whatever another pack's code raises without real tensors
        raise ValueError(_refusal(f"{origin(function)} in the place of {name}")) from error
    wanted = made if calls else given
    if calls not in ([], [True]) or any(result.get(key, wanted[key]) is not wanted[key] for key in given):
        _refuse(f"{origin(function)} in the place of {name}")
    return not calls


def _is_compiled(value: Any, network: Any) -> bool:
    """Whether an object patch is only what torch.compile makes of a layer: it has no effect on the ranks."""
    return hasattr(value, "_orig_mod") or value is network


def _warn_once(unknown: Iterable[str]) -> None:
    for name in sorted(set(unknown) - _warned):
        _warned.add(name)
        logger.warning(
            "Ascend: a node set the option %r of the MODEL's network. The ranks do not know it, so it may have no "
            "effect.", name,
        )  # fmt: skip


def _refusal(what: str) -> str:
    return (
        f"A node has put {what} into this MODEL. Its network runs on the ranks, where other nodes' code cannot run. "
        f"{INSTEAD}"
    )


def _refuse(what: str) -> None:
    raise ValueError(_refusal(what))
