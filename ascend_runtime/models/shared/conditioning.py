"""What of a job reaches a network besides the noise: texts, images, and the frames that are known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...ops.precision import check_finite
from ...specs import VideoSize
from ..family import Family
from .latents import Latents


class Prompt(Protocol):
    """What one branch of guidance is given (wire.messages.Conditioning)."""

    text: Tensor
    pooled: Tensor | None
    concat_latent: Tensor | None
    concat_mask: Tensor | None
    clip_vision: Tensor | None


@dataclass(frozen=True)
class Given:
    """latent [B,C,T,H,W], not normalised. noise_mask [B or 1,1,T,H,W]: 0 where it is known and stays; None: nowhere.

    prompts: of the branches of guidance, by name: "positive", and where there is one, "negative".
    """

    latent: Tensor
    noise_mask: Tensor | None
    prompts: Mapping[str, Prompt]

    @property
    def batch(self) -> int:
        return self.latent.shape[0]


class Branch(ABC):
    """One branch of guidance on this rank's device, in the dtype of the blocks. Equal only to itself."""

    @abstractmethod
    def context(self) -> Any:
        """What the network attends to: a new one for every network, which may keep there what it needs again."""

    @abstractmethod
    def input(self, latent: Tensor) -> Tensor:
        """What the network reads of a normalised latent [B,C,T,H,W]."""

    @abstractmethod
    def timestep(self, timestep: float) -> Tensor:
        """A timestep in 0..1000, as the network reads it."""


class Conditioner(ABC):
    """The rules of a family: which conditioning a transformer of this config reads, and how.

    empty_latent: where an empty latent for it can be had, in a sentence.
    """

    empty_latent: str

    def __init__(self, family: Family, config: Mapping[str, Any], latents: Latents):
        self.config, self.latents = config, latents
        self.form, self.text_width = family.form(config), family.text_width(config)
        self.pooled_width = family.pooled_width(config)

    def check(self, given: Given) -> None:
        """Raises ValueError, before any exchange, for what the network cannot honour."""
        self._check_latent(given.latent)
        if given.noise_mask is not None:
            check_shape("noise_mask", given.noise_mask, given.latent, channels=(1,))
        for name, prompt in given.prompts.items():
            self._check_text(name, prompt.text, given.batch)
            if self.pooled_width:
                self._check_pooled(name, prompt.pooled, given.batch)
            self.check_prompt(name, prompt, given)

    def check_prompt(self, name: str, prompt: Prompt, given: Given) -> None:
        """Raises ValueError for what a branch is given besides its text and pooled vector and cannot be honoured."""

    @abstractmethod
    def branch(self, prompt: Prompt, given: Given, device: torch.device, dtype: torch.dtype) -> Branch:
        """What the network sees of a prompt."""

    def per_token(self, given: Given) -> bool:
        """Whether each token has a timestep of its own."""
        return False

    @property
    def sees_known_clean(self) -> bool:
        """Whether the network sees known frames without noise; else they are as noisy as the rest."""
        return False

    def _check_latent(self, latent: Tensor) -> None:
        form = self.form
        if latent.ndim != 5 or latent.shape[1] != form.channels or not latent.numel():
            raise ValueError(
                f"The latent has the shape {list(latent.shape)}; this model makes videos of [B,{form.channels},T,H,W], "
                f"all 1 or more. {self.empty_latent}"
            )
        _, _, frames, height, width = latent.shape
        VideoSize(width=form.spatial * width, height=form.spatial * height, num_frames=form.temporal * (frames - 1) + 1)
        check_finite(latent, "The latent")

    def _check_text(self, name: str, text: Tensor, batch: int) -> None:
        width = self.text_width
        if text.ndim != 3 or not text.shape[1] or text.shape[2] != width or text.shape[0] not in (1, batch):
            raise ValueError(
                f"The {name} conditioning has the shape {list(text.shape)}; this model reads [1, tokens, {width}], "
                f"or one such for each of the {batch} videos of the latent. "
                "Encode the prompt with the text encoder that belongs to the model."
            )
        check_finite(text, f"The {name} conditioning")

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
    """For as many videos, where a network reads it."""
    return tensor.to(device, dtype).expand(batch, *[-1] * (tensor.ndim - 1))


def check_shape(name: str, tensor: Tensor, latent: Tensor, channels: tuple[int, ...]) -> None:
    """Raises ValueError for what is not [B or 1, channels, T, H, W] of a latent."""
    batch, _, *size = latent.shape
    shape = list(tensor.shape)
    if tensor.ndim != 5 or shape[0] not in (1, batch) or shape[1] not in channels or shape[2:] != size:
        frames, height, width = size
        wanted = " or ".join(f"[{n}, {c}, {frames}, {height}, {width}]" for n in sorted({1, batch}) for c in channels)
        raise ValueError(
            f"The {name} has the shape {shape}; with this latent and this model it must be {wanted}. "
            "Make image conditioning and latent by one node, with the VAE of the model."
        )
    check_finite(tensor, f"The {name}")
