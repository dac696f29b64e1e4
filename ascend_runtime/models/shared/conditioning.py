"""The conditioning of a network: text, images and known frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...ops.finite import check_finite
from ...specs import VaeForm, VideoSize
from ...specs.base import require_side
from .latents import Latents


# What to do about a further entry of a conditioning that a model does not use.
CURE = "Connect the output of a text encode node directly, or that of an image-to-video node for this model."


class Prompt(Protocol):
    """The conditioning of one guidance branch (wire.messages.Conditioning)."""

    text: Tensor
    pooled: Tensor | None
    concat_latent: Tensor | None
    concat_mask: Tensor | None
    clip_vision: Tensor | None
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float | None]


@dataclass(frozen=True)
class Given:
    """The inputs of a job. latent [B,C,T,H,W]: not normalised. noise_mask [B or 1,1,T,H,W]: 0 where the latent is known
    and is kept; None: nothing is known.

    prompts: of the guidance branches, by name: "positive" and, if there is one, "negative".
    embedded_guidance: the scale for prompts without one of their own; None for a model that reads none.
    """

    latent: Tensor
    noise_mask: Tensor | None
    prompts: Mapping[str, Prompt]
    embedded_guidance: float | None = None

    @property
    def batch(self) -> int:
        return self.latent.shape[0]


class Inputs(NamedTuple):
    """What a sampler outside of the ranks gives a network besides latent and timestep, as core ComfyUI makes it.

    shape: of the latent [B,C,T,H,W]. tensors: by name, each for B videos. Of all families: "text" [B,L,D], "concat"
    [B,C',T,H,W], further channels, ready for the network. Others as core's networks name them, such as "clip_fea",
    "time_dim_concat", "reference_latent", "y", "guidance", "attention_mask", "guiding_frame_index".
    """

    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]


class Branch(ABC):
    """One guidance branch on this rank's device, in the dtype of the blocks. Compares by identity.

    text [B, L, D]: that the network attends to.
    """

    text: Tensor

    @abstractmethod
    def context(self) -> Any:
        """The context that the network attends to. Each network needs a new one, in which it may cache tensors."""

    @abstractmethod
    def input(self, latent: Tensor) -> Tensor:
        """The network's input for a normalised latent [B,C,T,H,W]."""

    @abstractmethod
    def timestep(self, timestep: float) -> Tensor:
        """The network's input for a timestep in 0..1000."""

    def timesteps(self, timesteps: Tensor) -> Tensor:
        """The network's input for the timesteps [B], or [B,T], of a sampler outside of the ranks."""
        raise NotImplementedError

    def output(self, velocity: Tensor) -> Tensor:
        """The velocity of the latent, in what the network returned."""
        return velocity


class Reads(NamedTuple):
    """What a transformer reads: the form of its latents, and the channels of a text's tokens and of a pooled vector (0:
    it reads none)."""

    form: VaeForm
    text_width: int
    pooled_width: int = 0


class Conditioner(ABC):
    """A family's rules: which conditioning a transformer of this config takes, and how.

    empty_latent: a sentence that says which node makes an empty latent for it.
    tensors_read, numbers_read: which further entries of a conditioning it reads (`Prompt.tensors`, `Prompt.numbers`).
    cures: for further entries that it refuses: a sentence about what to do.
    embeds_guidance: whether the network reads a guidance scale as an input.
    """

    empty_latent: str
    tensors_read: frozenset[str] = frozenset()
    numbers_read: frozenset[str] = frozenset()
    cures: Mapping[str, str] = {}
    embeds_guidance: bool = False

    def __init__(self, config: Mapping[str, Any], latents: Latents, reads: Reads):
        self.config, self.latents = config, latents
        self.form, self.text_width, self.pooled_width = reads

    def check(self, given: Given) -> None:
        """Raises ValueError, before any communication, for inputs that the network does not support."""
        self._check_latent(given.latent)
        if given.embedded_guidance is not None and not self.embeds_guidance:
            raise ValueError(
                f"embedded_guidance is {given.embedded_guidance:g}, but this model reads no guidance scale. Leave it "
                "at its default; guidance_scale (cfg) is that of two prompts."
            )
        if given.noise_mask is not None:
            check_shape("noise_mask", given.noise_mask, given.latent, channels=(1,))
        for name, prompt in given.prompts.items():
            self._check_text(name, prompt.text, given.batch)
            if self.pooled_width:
                self._check_pooled(name, prompt.pooled, given.batch)
            self._check_further(name, prompt)
            self.check_prompt(name, prompt, given)

    def check_prompt(self, name: str, prompt: Prompt, given: Given) -> None:
        """Raises ValueError for a branch's inputs, other than its text and pooled vector, that the network does not
        support."""

    def read(self, given: Given) -> Given:
        """`given`, after `check`, with what the network reads of it."""
        return given

    def notes(self, given: Given) -> list[str]:
        """Warnings to the user about inputs that have no effect, each a sentence."""
        return []

    def embedded_guidance(self, prompt: Prompt, given: Given) -> float | None:
        """The scale that the network reads for a prompt; None: none."""
        return given.embedded_guidance

    def first_frame(self, given: Given) -> Tensor | None:
        """The normalised latent [B or 1,C,1,H,W] of the image that the videos begin with, for
        `SampleSpec.image_start`; None: there is none, or the model has no such start."""
        return None

    @abstractmethod
    def branch(self, prompt: Prompt, given: Given, device: torch.device, dtype: torch.dtype) -> Branch:
        """The guidance branch of a prompt."""

    def check_inputs(self, inputs: Inputs) -> None:
        """Raises ValueError, which names the input, for inputs of a model call that the network does not support."""
        raise ValueError(
            "A model of this family cannot be called by samplers outside of the ranks. Load it with Ascend Load "
            "Diffusion Model, and sample with Ascend Sampler."
        )

    def outer_branch(self, inputs: Inputs, device: torch.device, dtype: torch.dtype) -> Branch:
        """The branch of a pass for a sampler outside of the ranks, whose inputs `check_inputs` accepted."""
        raise NotImplementedError

    def outer_size(self, inputs: Inputs) -> tuple[int, int, int]:
        """The size [T,H,W] of all that the tokens of a pass come from: the latent, padded, and further frames."""
        frames, height, width = inputs.shape[2:]
        return frames, height, width

    def per_token(self, given: Given) -> bool:
        """Whether each token has its own timestep."""
        return False

    @property
    def sees_known_clean(self) -> bool:
        """Whether the network reads known frames without noise; else they are as noisy as the others."""
        return False

    def _check_latent(self, latent: Tensor) -> None:
        form = self.form
        if latent.ndim != 5 or latent.shape[1] != form.channels or not latent.numel():
            raise ValueError(
                f"The latent has the shape {list(latent.shape)}; this model needs [B,{form.channels},T,H,W], with all "
                f"sizes at least 1. {self.empty_latent}"
            )
        _, _, frames, height, width = latent.shape
        for name, length, side in (("rows", height, "height"), ("columns", width, "width")):
            pixels = length * form.spatial
            given = f"The video's {side} is {pixels}, as the latent has {length} {name}; with this model"
            require_side(given, pixels, form.multiple, self.empty_latent)
        VideoSize(width=form.spatial * width, height=form.spatial * height, num_frames=form.temporal * (frames - 1) + 1)
        check_finite(latent, "The latent")

    def _check_text(self, name: str, text: Tensor, batch: int) -> None:
        width = self.text_width
        if text.ndim != 3 or not text.shape[1] or text.shape[2] != width or text.shape[0] not in (1, batch):
            raise ValueError(
                f"The {name} conditioning has the shape {list(text.shape)}; this model needs [1, tokens, {width}], or "
                f"[{batch}, tokens, {width}] for the {batch} videos of the latent. Encode the prompt with the text "
                "encoder that belongs to the model."
            )
        check_finite(text, f"The {name} conditioning")

    def _check_further(self, name: str, prompt: Prompt) -> None:
        """A number that is None asks for nothing, so only a model that reads it needs to know it."""
        numbers = {entry for entry, number in prompt.numbers.items() if number is not None}
        unknown = sorted((prompt.tensors.keys() - self.tensors_read) | (numbers - self.numbers_read))
        if unknown:
            carried, cures = ", ".join(unknown), [self.cures[entry] for entry in unknown if entry in self.cures]
            raise ValueError(
                f"The {name} conditioning carries {carried}, which this model does not use. "
                + (cures[0] if cures else CURE)
            )
        for entry, tensor in prompt.tensors.items():
            check_finite(tensor, f"The {name} conditioning's {entry}")

    def _check_pooled(self, name: str, pooled: Tensor | None, batch: int) -> None:
        width = self.pooled_width
        held = None if pooled is None else list(pooled.shape)
        if held not in ([1, width], [batch, width]):
            has = "no pooled vector" if held is None else f"a pooled vector of the shape {held}"
            raise ValueError(
                f"The {name} conditioning has {has}; this model reads [1, {width}], or one such for each of the "
                f"{batch} videos of the latent. Encode the prompt with the text encoders that belong to the model."
            )
        check_finite(pooled, f"The {name} conditioning's pooled vector")


def ready(tensor: Tensor, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`tensor` on this device and in this dtype, expanded to `batch` videos."""
    return tensor.to(device, dtype).expand(batch, *[-1] * (tensor.ndim - 1))


def check_shape(name: str, tensor: Tensor, latent: Tensor, channels: tuple[int, ...]) -> None:
    """Raises ValueError for a tensor that is not [B or 1, channels, T, H, W], with the sizes of `latent`."""
    batch, _, *size = latent.shape
    shape = list(tensor.shape)
    if tensor.ndim != 5 or shape[0] not in (1, batch) or shape[1] not in channels or shape[2:] != size:
        frames, height, width = size
        wanted = " or ".join(f"[{n}, {c}, {frames}, {height}, {width}]" for n in sorted({1, batch}) for c in channels)
        raise ValueError(
            f"The {name} has the shape {shape}; with this latent and this model it must be {wanted}. "
            "Make the image conditioning and the latent with the same node, and with the model's VAE."
        )
    check_finite(tensor, f"The {name}")
