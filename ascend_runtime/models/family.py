"""The interface between a family of video models and the rest of the runtime.

A family is a folder with a `Family` in it, listed in `registry.py`. This module imports neither torch nor diffusers, so
that nodes and a planner can use it inside ComfyUI. Networks are imported when a rank first needs them (`Family.network`
and the methods after it).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..specs import Calibration, VaeForm
from ..specs.presets import FamilyPresets
from .core_text import CoreText
from .cost import PassSize, SlicedSums, Work
from .defaults import Defaults, Distillation
from .hubs import HubFile, PublishedModel
from .image_forms import ImageForm
from .latent_format import LatentFormat
from .shapes import Shapes

if TYPE_CHECKING:
    from torch import nn

    from ..checkpoints.fused import Split
    from .shared.conditioning import Conditioner
    from .shared.latents import Latents
    from .shared.text import TextEncoding
    from .shared.vae import VideoVae

TRANSFORMER, TEXT_ENCODER, VAE = "transformer", "text_encoder", "vae"  # the parts of every family
TEXT_ENCODER_2 = "text_encoder_2"  # of a family with two
VISION = "vision_tower"  # of a family whose text encoder reads images too
TRANSFORMER_2 = "transformer_2"  # the second expert of a model that has two


@dataclass(frozen=True)
class Part:
    """One network of a family on disk: how it is recognised, and how its tensors are named.

    what: its name in errors. published: the published file, and where to get it.
    class_name: the key and the value by which a config.json names this network.
    signature: the number of dims of some of its tensors, by name; no other network has the first two.
    begins: the names of one of its tensors in all systems; the prefix before such a name in a file is the network's.
    rename: maps a tensor's name in any system to the parameter's name; None: the tensor is not a parameter.
    config: builds the config from the shapes of the tensors. Raises ValueError if they do not fit.
    other: a sentence about tensors of these shapes if they belong to a similar, unsupported network; else empty.
    other_classes: the classes in configs of similar, unsupported networks, and what these are.
    incomplete: a sentence about tensors of these shapes, some of which are missing; empty if nothing is known.
    blocks: the prefixes of its numbered blocks, one for each kind of blocks with a numbering of its own.
    check: raises ValueError, which names the file, for an unsupported config.
    hidden: config fields that the shapes do not show, with the values that are used without a config.
    tokenizer_folder: the folder of a text encoder's tokenizer, relative to the published file's.
    inner_config: maps the config.json of a folder to this network's config, for networks that are published as parts
        of larger ones, with longer names of tensors. None: a folder holds this network only.
    brings_tokenizer: whether published files of a text encoder have a tokenizer in them or next to them.
    foreign: whether a tensor of this name belongs to the larger network. unread: whether it belongs to this one, of
        this config, but is not used and therefore not read.
    split: the parameters in a tensor on disk that holds several (see checkpoints.fused); None: each tensor is one.
    published_name: the name, as diffusers or transformers write it, of the tensor that holds a parameter. Several with
    one name are its columns, in the network's order.
    """

    what: str
    published: str
    class_name: tuple[str, str]
    signature: Mapping[str, int]
    begins: tuple[str, ...]
    rename: Callable[[str], str | None]
    config: Callable[[Shapes], dict]
    other: Callable[[Shapes], str] = lambda shapes: ""
    other_classes: Mapping[str, str] = field(default_factory=dict)
    incomplete: Callable[[Shapes], str] = lambda shapes: ""
    blocks: tuple[str, ...] = ("blocks.",)
    check: Callable[[dict, Path], None] = lambda config, file: None
    hidden: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_folder: str | None = None
    inner_config: Callable[[Mapping[str, Any]], dict] | None = None
    brings_tokenizer: bool = True
    foreign: Callable[[str], bool] = lambda name: False
    unread: Callable[[str, Mapping[str, Any]], bool] = lambda name, config: False
    split: Split | None = None
    published_name: Callable[[str], str] = lambda name: name

    def config_in(self, config: Mapping[str, Any]) -> dict | None:
        """This network's config in the content of a config.json; None if that describes another network."""
        own = dict(config) if self.inner_config is None else self.inner_config(config)
        key, wanted = self.class_name
        return own if own.get(key) == wanted else None


@dataclass(frozen=True)
class LoraNames:
    """How LoRA files name the layers of a transformer.

    spellings: maps every name that a layer with these parameters can have in a file to the layer's own name.
    further: the parameters that other models of the family have, and a model with these shapes lacks.
    left_out: the reason to leave out a key that
    changes a further layer (given by name) or an unknown one (None).
    fused: the parameters in files that replace several of the network's, or one with its rows in another order, for a
        model with these shapes. split: the network's parameters in each.
    made_for: (the shapes that do not fit, the model's shapes, the reasons of `left_out`) -> a sentence about the model
        that a file was made for; empty if unknown.
    """

    spellings: Callable[[set[str]], dict[str, str]]
    further: Callable[[Shapes], Iterable[str]] = lambda shapes: ()
    left_out: Callable[[str, str | None], str] = lambda key, layer: "of no layer of this model"
    made_for: Callable[[Shapes, Shapes, Iterable[str]], str] = lambda misfits, shapes, reasons: ""
    fused: Callable[[Shapes], Iterable[str]] = lambda shapes: ()
    split: Split | None = None


@dataclass(frozen=True)
class WeightRules:
    """How a rank holds the parameters of a transformer, by name.

    fp32: whether a parameter is kept in fp32 whatever the dtype of the blocks.
    replicated: whether every rank keeps it whole under FSDP.
    cut_dim: the dim along which tensor parallelism cuts it; None: it is replicated.
    in_8_bits: whether a linear layer is quantized when a model is quantized on the fly.
    """

    fp32: Callable[[str], bool] = lambda name: False
    replicated: Callable[[str], bool] = lambda name: False
    cut_dim: Callable[[str], int | None] = lambda name: None
    in_8_bits: Callable[[str], bool] = lambda layer: False

    def keeps_whole(self, name: str, shape: tuple[int, ...], values: int, tp: int) -> bool:
        """Whether tensor parallelism of this degree leaves groups of so many values of a weight's row whole."""
        return 1 in (tp, values) or self.cut_dim(name) != 1 or shape[1] % (tp * values) == 0


@dataclass(frozen=True)
class OriginalLayout:
    """How a family's authors lay out a model's folder.

    models: a pattern of the models' folders in a download, next to which their text encoders may lie; empty: there are
    none.
    folders: the names of the folders of each part in a model's folder, besides diffusers'.
    files: the weights in the folder of a part, the first that exists; loose: a pattern of weights in a model's folder
    itself, whose part their content shows.
    classes: the "_class_name" in the config.json of parts, or of a model's folder that is the part itself.
    """

    models: str = ""
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loose: str = ""
    classes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StockNames:
    """What stock ComfyUI graphs call the files of a family.

    names: patterns of the names of files, in small letters, by part. others: patterns of those among them that are of
    similar, unsupported networks, by what these are.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)

    def are_in(self, name: str, part: str) -> bool:
        """Whether a file's name says that it holds this part of a model of the family."""
        return part in self.names and re.search(self.names[part], name.lower()) is not None


@dataclass(frozen=True)
class DiffusersPipeline:
    """diffusers' pipeline of a model.

    class_name: of the pipeline. classes: library and class of each possible part, None for a part that it leaves out.
    settings: further entries of its model_index.json. scheduler: its scheduler_config.json; None: there is none.
    left_out: the parts that a conversion cannot make, each in a sentence.
    """

    class_name: str
    classes: Mapping[str, tuple[str, str] | None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()


class Family(ABC):
    """A family of video models.

    name: of its folder. title: its name in sentences.
    parts: its networks on disk: TRANSFORMER, VAE, TEXT_ENCODER, further text encoders ("text_encoder_2"), and VISION.
    layout, stock: see OriginalLayout, StockNames.
    repository: the published model that errors recommend.
    schedule: the name of its own schedule in jobs and workflows.
    presets: its own values of step caches' presets.
    weights, loras: see WeightRules, LoraNames. to_mindspeed: maps a transformer's parameter name to MindSpeed-MM's;
        None: MindSpeed-MM does not support the family.
    mask_channels: the numbers of channels that a conditioning's `concat_mask` can have.
    core_text: how core ComfyUI encodes its prompts; None: core does not know the family.
    deals_tiles: whether several ranks can share the published tiles of its VAE.
    distillations: how models and LoRAs of the family were distilled to few steps; the first whose name fits is used.

    Transformer configs are those that diffusers writes.
    """

    name: str
    title: str
    parts: Mapping[str, Part]
    repository: str
    schedule: str
    layout: OriginalLayout = OriginalLayout()
    stock: StockNames = StockNames()
    presets: FamilyPresets = {}
    weights: WeightRules = WeightRules()
    loras: LoraNames
    to_mindspeed: Callable[[str], str] | None = None
    mask_channels: frozenset[int] = frozenset({1})
    core_text: CoreText | None = None
    deals_tiles: bool = False
    distillations: tuple[Distillation, ...] = ()

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The text encoders, the main one first."""
        return tuple(part for part in self.parts if part.startswith(TEXT_ENCODER))

    # Properties of a model, from the configs of its transformers

    @abstractmethod
    def form(self, config: Mapping[str, Any]) -> VaeForm:
        """The form of a transformer's latents."""

    @abstractmethod
    def vae_form(self, config: Mapping[str, Any]) -> VaeForm:
        """The form of a VAE's latents."""

    @abstractmethod
    def latent_format(self, config: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentFormat:
        """How a transformer's latents are normalised and previewed. vae: the config of the VAE next to it, if any."""

    @abstractmethod
    def defaults(self, config: Mapping[str, Any], experts: int) -> Defaults:
        """The defaults of the published model that matches this config and number of experts."""

    def check_transformers(self, configs: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
        """Raises ValueError, which names the file, if these are not the transformers of one supported model."""

    def with_original_config(self, config: dict, original: Mapping[str, Any], file: Path) -> dict:
        """A transformer's config, read off its shapes, with the fields of its authors' config in `file` that the shapes
        do not show. Raises ValueError if the two do not fit."""
        return config

    def vae_for(self, channels: int) -> str:
        """The name of its VAE whose latents have this number of channels; empty if there is none."""
        return ""

    def makes_from_text(self, config: Mapping[str, Any]) -> bool:
        """Whether a model can generate from text only."""
        return True

    def image_forms(self, form: VaeForm) -> Mapping[str, ImageForm]:
        """The ways in which images condition models whose VAE has this form, by their names in workflows; the first is
        the default."""
        return {"": ImageForm()}

    def left_open(self, config: Mapping[str, Any]) -> str:
        """What the config of a transformer, read off its shapes, does not decide about the model, and what does; empty
        if it decides all."""
        return ""

    def calibration(self, config: Mapping[str, Any], own: Defaults, pixels: int, expert: str) -> Calibration:
        """The published calibration of step caches for an expert of this model and frames of this number of pixels."""
        return Calibration()

    @property
    def published(self) -> Mapping[str, PublishedModel]:
        """The published models by name."""
        return {}

    @property
    def downloads(self) -> Mapping[str, tuple[HubFile, ...]]:
        """All files that a model needs, by the model's name, or by that of a variant."""
        return {}

    # Cost of a pass

    @property
    def text_tokens(self) -> int:
        """The most tokens of a prompt that a transformer reads."""
        return 512

    def per_token(self, config: Mapping[str, Any]) -> bool:
        """Whether each token has its own timestep if an image or frames of the video are known."""
        return False

    @abstractmethod
    def grid(self, config: Mapping[str, Any], size: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of tokens (frames, rows, columns) of a latent of this size [T, H, W]."""

    @abstractmethod
    def width(self, config: Mapping[str, Any]) -> int:
        """The number of channels of a token in the blocks."""

    def heads(self, config: Mapping[str, Any]) -> int:
        """The number of heads of the blocks' attention."""
        return config["num_attention_heads"]

    @abstractmethod
    def smaller(self, config: Mapping[str, Any], heads: int, blocks: int) -> dict[str, Any]:
        """The config of a similar network that makes videos from text, with this number of heads, as wide for each, and
        of blocks, for measurements."""

    @abstractmethod
    def text_width(self, config: Mapping[str, Any]) -> int:
        """The number of channels of the text tokens that a transformer reads."""

    def pooled_width(self, config: Mapping[str, Any]) -> int:
        """The number of channels of the pooled prompt vector that a transformer reads; 0: it reads none."""
        return 0

    def text_in_sequence(self, config: Mapping[str, Any], tokens: int) -> int:
        """The number of text tokens that follow the video's in the sequence of the blocks (joint attention); 0 if the
        text is read by cross-attention."""
        return 0

    @abstractmethod
    def work(self, config: Mapping[str, Any], size: PassSize) -> Work:
        """The FLOPs of a pass through a transformer on all ranks."""

    @abstractmethod
    def sliced_sums(
        self, config: Mapping[str, Any], size: PassSize, video: int, itemsize: int, again: bool = True
    ) -> SlicedSums:
        """What ranks of tensor parallelism exchange in a pass. video: the tokens on the rank that are the video's and
        no padding. itemsize: of the blocks' dtype. again: whether an earlier pass had the same text."""

    # Networks and what they need

    def sigmas(self, steps: int, shift: float, solver: str) -> tuple[float, ...] | None:
        """Its own schedule: decreasing sigmas from 1 to 0, one more than steps. None: those of diffusers' scheduler of
        this solver with this shift."""
        return None

    @abstractmethod
    def network(self, part: str, config: Mapping[str, Any], tp: Any = None) -> nn.Module:
        """A network on the meta device. tp: how tensor parallelism cuts a transformer (parallel.tensor); None: whole.

        A transformer implements `models.shared.transformer.VideoTransformer`.
        """

    def whole_network(self, part: str, config: Mapping[str, Any]) -> nn.Module:
        """As `network`, with the parameters that are not used too: for conversions."""
        return self.network(part, config)

    @abstractmethod
    def vae(self, network: nn.Module, form: VaeForm) -> VideoVae:
        """The VAE of a network whose weights are loaded."""

    @abstractmethod
    def text(self) -> TextEncoding:
        """How prompts are tokenised and encoded."""

    @abstractmethod
    def conditioner(self, config: Mapping[str, Any], latents: Latents) -> Conditioner:
        """How a transformer of this config is conditioned on text, images and known frames."""

    def original_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The names and shapes of a transformer's tensors as core ComfyUI's network has them. Raises ValueError if core
        ComfyUI has no such network, so that its samplers cannot be used."""
        raise ValueError(
            f"Core ComfyUI does not know {self.title} models. Load them with Ascend Load Diffusion Model, and sample "
            "with Ascend Sampler."
        )

    def empty_latent(self, shape: tuple[int, ...]) -> Any:
        """A latent [B,C,T,H,W], not normalised, that is zero after normalisation."""
        import torch

        return torch.zeros(shape)

    def pipeline(self, configs: Mapping[str, Mapping[str, Any]]) -> DiffusersPipeline:
        """diffusers' pipeline of networks with these configs, by folder name. Raises ValueError if there is none."""
        raise ValueError(f"There is no diffusers pipeline for {self.title} models. Convert single parts.")
