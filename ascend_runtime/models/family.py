"""What a family of video models says of itself: the one door between it and the rest of the runtime.

A family is a folder with a `Family` in it, listed in `registry.py`. What stands here is light: it imports neither torch
nor diffusers, so that nodes and a planner may ask it inside ComfyUI. Networks are imported when a rank first needs them
(`Family.network` and what follows it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..specs import Calibration, VaeForm
from .cost import PassSize, Work
from .defaults import Defaults
from .latent_format import LatentFormat
from .shapes import Shapes

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoints.fused import Split
    from .shared.conditioning import Conditioner
    from .shared.latents import Latents
    from .shared.text import TextEncoding
    from .shared.vae import VideoVae

TRANSFORMER, TEXT_ENCODER, VAE = "transformer", "text_encoder", "vae"  # parts that every family has


@dataclass(frozen=True)
class Part:
    """One network of a family as it lies on disk: how it is recognised, and what its tensors are called.

    what: its name in errors. published: the published file, and where to get it.
    class_name: the key and the value by which a config.json names this network.
    signature: names of tensors that it has, each with its number of dims; no other network has the first two.
    begins: names of one of its tensors in any system; what precedes such a name in a file is the network's prefix.
    rename: its own name of a tensor in any system; None: the tensor is no parameter.
    config: its config, read off the shapes of its tensors. Raises ValueError where they make none.
    other: what network tensors of these shapes are of, if it is one that is close to this one; else empty.
    blocks: the prefixes of its numbered blocks: one a kind of blocks that has numbers of its own.
    check: raises ValueError, which names the file, for a config that cannot be used.
    hidden: what no shape shows of a config, and the values that it has where there is none.
    tokenizer_folder: where a text encoder's tokenizer lies next to the published file.
    split: which parameters a tensor on disk holds as ranges of its rows (see checkpoints.fused); None: each is one.
    """

    what: str
    published: str
    class_name: tuple[str, str]
    signature: Mapping[str, int]
    begins: tuple[str, ...]
    rename: Callable[[str], str | None]
    config: Callable[[Shapes], dict]
    other: Callable[[Shapes], str] = lambda shapes: ""
    blocks: tuple[str, ...] = ("blocks.",)
    check: Callable[[dict, Path], None] = lambda config, file: None
    hidden: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_folder: str | None = None
    split: Split | None = None


@dataclass(frozen=True)
class LoraNames:
    """How LoRA files name the layers of a transformer.

    spellings: every name that a layer of these parameters can have in a file, and the layer's own name.
    further: the parameters that other models of the family have, and one of these shapes has not.
    left_out: why a key is left out that changes a further layer (its name) or one that is not known (None).
    fused: the parameters that files may have in the place of several of the network's, or of one with its rows in
    another order. split: which ones each holds.
    made_for: which model a file was made for, in a sentence, by the shapes of what does not fit, the model's own shapes
        and the reasons of `left_out`; empty where that is not known.
    """

    spellings: Callable[[set[str]], dict[str, str]]
    further: Callable[[Shapes], Iterable[str]] = lambda shapes: ()
    left_out: Callable[[str, str | None], str] = lambda key, layer: "of no layer of this model"
    made_for: Callable[[Shapes, Shapes, Iterable[str]], str] = lambda misfits, shapes, reasons: ""
    fused: frozenset[str] = frozenset()
    split: Split | None = None


@dataclass(frozen=True)
class WeightRules:
    """How a rank holds the parameters of a transformer, by name.

    fp32: whether a parameter is in fp32 whatever the dtype of the blocks.
    replicated: whether every rank keeps it whole under FSDP.
    cut_dim: the dim along which tensor parallelism cuts it; None: every rank has all of it.
    in_8_bits: whether a linear layer is quantized where a model is to be quantized as it is read.
    """

    fp32: Callable[[str], bool] = lambda name: False
    replicated: Callable[[str], bool] = lambda name: False
    cut_dim: Callable[[str], int | None] = lambda name: None
    in_8_bits: Callable[[str], bool] = lambda layer: False


@dataclass(frozen=True)
class Pipeline:
    """diffusers' pipeline of a model.

    class_name: of the pipeline. classes: library and class of each part that it can have, None for one that it has not.
    settings: further entries of its model_index.json. scheduler: its scheduler_config.json; None: there is none.
    left_out: what a conversion cannot make, each in a sentence.
    """

    class_name: str
    classes: Mapping[str, tuple[str, str] | None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()


class Family(ABC):
    """A family of video models.

    name: of its folder. title: its name in sentences.
    parts: its networks on disk: TRANSFORMER, VAE, TEXT_ENCODER, and further text encoders ("text_encoder_2").
    original_class: what the original's config.json of a transformer says under "_class_name"; None: there is none.
    repository: the published model that an error recommends.
    schedule: the name of its own schedule in jobs and workflows.
    weights, loras: see there. to_mindspeed: MindSpeed-MM's name of a transformer's parameter; None: that has no such
    model.

    A transformer is described by its config, as diffusers writes it.
    """

    name: str
    title: str
    parts: Mapping[str, Part]
    repository: str
    schedule: str
    original_class: str | None = None
    weights: WeightRules = WeightRules()
    loras: LoraNames
    to_mindspeed: Callable[[str], str] | None = None

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The text encoders, the main one first."""
        return tuple(part for part in self.parts if part.startswith(TEXT_ENCODER))

    # What a model is, by the configs of its transformers

    @abstractmethod
    def form(self, config: Mapping[str, Any]) -> VaeForm:
        """The form of the latents that a transformer makes."""

    @abstractmethod
    def vae_form(self, config: Mapping[str, Any]) -> VaeForm:
        """The form of the latents that a VAE makes."""

    @abstractmethod
    def latent_format(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentFormat:
        """How a transformer's latents are normalised and pictured. vae: the config of the VAE next to it, if any."""

    @abstractmethod
    def defaults(self, config: Mapping[str, Any], experts: int) -> Defaults:
        """What the published model is run with that looks as this one of so many experts."""

    def check_transformers(self, configs: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
        """Raises ValueError, which names the file, where these are not the transformers of one model that can be
        used."""

    def with_original_config(self, config: dict, said: Mapping[str, Any], file: Path) -> dict:
        """A transformer's config, read off shapes, with what the original's `file` says, and no shape shows. Raises
        ValueError where the two do not fit."""
        return config

    def vae_for(self, channels: int) -> str:
        """The name of its VAE whose latents have so many channels; empty where there is none."""
        return ""

    def makes_from_text(self, config: Mapping[str, Any]) -> bool:
        """Whether a model needs no image."""
        return True

    def known_in_latent(self, form: VaeForm) -> bool:
        """Whether known frames of a video stand in its latent itself, for models whose VAE has this form; else they are
        given next to it."""
        return False

    def calibration(self, config: Mapping[str, Any], own: Defaults, pixels: int, expert: str) -> Calibration:
        """What was published for step caches of such a model, of one of its experts and pictures of so many pixels."""
        return Calibration()

    # What a pass costs

    @abstractmethod
    def grid(self, config: Mapping[str, Any], size: tuple[int, int, int]) -> tuple[int, int, int]:
        """The tokens of a latent of this size [T, H, W], as frames, rows and columns."""

    @abstractmethod
    def width(self, config: Mapping[str, Any]) -> int:
        """The channels of a token in the blocks."""

    @abstractmethod
    def text_width(self, config: Mapping[str, Any]) -> int:
        """The channels of a text's tokens, as a transformer reads them."""

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """The channels of the one vector of a prompt that a transformer reads besides the text; 0: it reads none."""
        return 0

    def text_in_sequence(self, config: Mapping[str, Any], tokens: int) -> int:
        """How many of a text's tokens stand behind the video's in the one sequence that the blocks compute, and whose
        self-attention is joint: all of them, or none where the text has an attention of its own."""
        return 0

    @abstractmethod
    def work(self, config: Mapping[str, Any], size: PassSize) -> Work:
        """FLOPs of a pass of all ranks through a transformer."""

    @abstractmethod
    def bytes_taken(self, config: Mapping[str, Any], size: PassSize, itemsize: int) -> int:
        """Bytes that a pass takes on a rank besides weights and caches. itemsize: of the blocks' dtype."""

    # What it computes with

    def sigmas(self, steps: int, shift: float, solver: str) -> tuple[float, ...] | None:
        """Its own schedule: falling sigmas from 1 to 0, one more than steps. None: as diffusers' scheduler of the
        solver spreads them with this shift."""
        return None

    @abstractmethod
    def network(self, part: str, config: Mapping[str, Any], tp: Any = None) -> nn.Module:
        """A network on the meta device. tp: how tensor parallelism cuts a transformer (parallel.tensor); None: whole.

        A transformer has what `models.transformer.VideoTransformer` names.
        """

    @abstractmethod
    def vae(self, network: nn.Module, form: VaeForm) -> VideoVae:
        """A VAE whose weights were read."""

    @abstractmethod
    def text(self) -> TextEncoding:
        """How prompts are tokenised and encoded."""

    @abstractmethod
    def conditioner(self, config: Mapping[str, Any], latents: Latents) -> Conditioner:
        """What of texts, images and known frames reaches a transformer."""

    def empty_latent(self, shape: tuple[int, ...]) -> Any:
        """A latent [B,C,T,H,W], not normalised, that is zeros once it is normalised."""
        import torch

        return torch.zeros(shape)

    def pipeline(self, configs: Mapping[str, Mapping[str, Any]]) -> Pipeline:
        """diffusers' pipeline of the networks with these configs, by the names of their folders. Raises ValueError
        where there is none."""
        raise ValueError(f"No diffusers pipeline of {self.title} models is known here. Convert single parts.")
