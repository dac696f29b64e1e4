"""Nodes that let Ascend Sampler skip a part of its work: one table, from which their classes are made.

To add a node, add an entry to ACCELERATORS; its `kind` is an accelerator that specs.presets knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from comfy_api.latest import io

from ..ascend_runtime.models.registry import families
from ..ascend_runtime.specs import AccelerationSpec
from ..ascend_runtime.specs.acceleration import MAX_STEPS, RAINFUSIONS, STEP_CACHES
from ..ascend_runtime.specs.base import Spec
from ..ascend_runtime.specs.presets import PRESETS, chosen, describe_family, describe_presets
from . import types
from .page.schema import ACCELERATION, FAMILIES, Schema
from .page.validation import refusal

CUSTOM = "custom"
DEFAULT_PRESET = "balanced"
ALIASES = (*FAMILIES, "acceleration", "speed up", "faster", "cache", "加速")


@dataclass(frozen=True)
class Widget:
    """A widget below `preset`; it sets the description's field of the same name.

    socket: of comfy_api's io, such as io.Int. limits: what else its Input takes: min, max, step, round or options.
    automatic: the value that leaves the choice to the accelerator (None in the description); None: there is none.
    word: what the page shows for that value.
    with_any_preset: it counts with any preset; otherwise only with preset custom.
    """

    name: str
    socket: Any
    default: int | float | str
    limits: dict[str, Any]
    tooltip: str
    automatic: int | float | None = None
    word: str = "auto"
    with_any_preset: bool = False

    def input(self) -> io.Input:
        tooltip = self.tooltip if self.with_any_preset else f"{self.tooltip} Used only with preset custom."
        return self.socket.Input(self.name, default=self.default, optional=True, tooltip=tooltip, **self.limits)

    def field(self, value):
        """The value of the description's field."""
        return None if self.automatic is not None and value == self.automatic else value


@dataclass(frozen=True)
class Accelerator:
    """A node: node_id, display_name and aliases as page.schema.Schema has them, kind as specs.presets does."""

    node_id: str
    display_name: str
    description: str
    kind: str
    widgets: tuple[Widget, ...]
    aliases: tuple[str, ...]

    def spec(self, preset: str, **values) -> Spec:
        """The description that the widgets stand for. values: of widgets, by name; the others have their default.

        Raises ValueError for an unknown preset or widget, and for illegal values.
        """
        if preset not in (*PRESETS, CUSTOM):
            raise ValueError(f"preset is {preset!r}; it can be one of {', '.join((*PRESETS, CUSTOM))}.")
        defaults = {widget.name: widget.default for widget in self.widgets}
        unknown = ", ".join(sorted(values.keys() - defaults))
        if unknown:
            raise ValueError(f"{self.display_name} has no {unknown}; its widgets are preset, {', '.join(defaults)}.")
        values = defaults | values
        used = [widget for widget in self.widgets if widget.with_any_preset or preset == CUSTOM]
        fields = {widget.name: widget.field(values[widget.name]) for widget in used}
        return chosen(self.kind, None if preset == CUSTOM else preset, **fields)

    def inputs(self) -> list[io.Input]:
        preset = io.Combo.Input(
            "preset",
            options=[*PRESETS, CUSTOM],
            default=DEFAULT_PRESET,
            tooltip="How much work to save: quality changes the video least, fast saves the most. custom: uses "
            f"the values of the widgets below.\n{self._presets()}",
        )
        chain = types.Acceleration.Input(
            "acceleration",
            optional=True,
            tooltip="From another accelerator, to use both. RainFusion works with any cache; two caches cannot be "
            "combined.",
        )
        return [preset, *(widget.input() for widget in self.widgets), chain]

    def schema(self) -> Schema:
        return Schema(
            node_id=self.node_id,
            display_name=self.display_name,
            category=ACCELERATION,
            search_aliases=[*ALIASES, *self.aliases],
            automatic={one.name: (one.automatic, one.word) for one in self.widgets if one.automatic is not None},
            only_with={one.name: ("preset", CUSTOM) for one in self.widgets if not one.with_any_preset},
            description=self.description,
            inputs=self.inputs(),
            outputs=[
                types.Acceleration.Output(
                    display_name="acceleration", tooltip="For Ascend Sampler, or for another accelerator."
                )
            ],
        )

    def _presets(self) -> str:
        own = [one for one in families().values() if one.presets and self.kind == "step_cache"]
        return "\n".join(
            [describe_presets(self.kind), *(f"{one.title} models: {describe_family(one.presets)}." for one in own)]
        )


def _count(name: str, default: int, tooltip: str, least: int = 0, most: int = MAX_STEPS, automatic=None) -> Widget:
    return Widget(name, io.Int, default, {"min": least, "max": most}, tooltip, automatic)


def _method(name: str, options: tuple[str, ...], default: str, tooltip: str) -> Widget:
    return Widget(name, io.Combo, default, {"options": list(options)}, tooltip, with_any_preset=True)


def _position(name: str, tooltip: str) -> Widget:
    """The number of a step or of a block. 0 is a valid one, so -1 means automatic."""
    return _count(name, -1, tooltip, least=-1, automatic=-1)


WINDOW = (  # the fields of specs.acceleration.Window
    _position("start", "The first step, counted from 0, whose results are kept. The steps after it may reuse them. "
              "auto (-1): at 30 % of the steps (step 12 of 40)."),
    _position("end", "The last step, counted from 0, that may reuse results. auto (-1): at 92.5 % of the "
              "steps (step 37 of 40)."),
    _count("interval", 4, "How often a step is computed from start on. 4: one step in four, and the other three reuse "
           "its results. 1: every step, so nothing is reused.", least=1),
    _count("first_block", 0, "The first block of the model that may reuse results, counted from 0. Earlier blocks are "
           "always computed."),
    _position("last_block", "The last block that may reuse results, counted from 0. Later blocks are always computed. "
              "auto (-1): the last block of the model."),
)  # fmt: skip

ACCELERATORS = (
    Accelerator(
        "AscendAttentionCache",
        "Ascend AttentionCache",
        "Reuses the self-attention results of earlier steps. The video changes little, but the cache uses much device "
        "memory.",
        "attention_cache",
        (
            Widget("ratio", io.Float, 0.0, {"min": 0.0, "max": 10.0, "step": 0.05, "round": 0.01},
                   "Above 1: the speed-up of the denoise loop to reach, such as 1.2. start and interval are then "
                   "chosen to reach it, with an interval of at least the value below. off (0), or 1: start and "
                   "interval are used as set below.", automatic=0.0, word="off"),
            *WINDOW,
        ),
        ("attention cache", "mindie sd"),
    ),
    Accelerator(
        "AscendBlockCache",
        "Ascend Block Cache",
        "Skips a range of blocks in some steps, and reuses what they added in an earlier step. Uses little memory.",
        "block_cache",
        WINDOW,
        ("dit cache", "block skip", "mindie sd"),
    ),
    Accelerator(
        "AscendStepCache",
        "Ascend Step Cache",
        "Skips the blocks of a step while the result seems to change little. Uses little memory and saves the most.",
        "step_cache",
        (
            _method("method", STEP_CACHES, "fbcache", "How to decide which steps to skip. Used with every preset.\n"
                    "fbcache: compares what the first block adds with what it added in the last computed step. Works "
                    "with any model.\n"
                    "teacache: estimates the change from the timestep or the first block's input, by a polynomial that "
                    "was fitted to the model.\n"
                    "magcache: uses how much each step is known to change with this model.\n"
                    "taylorseer: skips steps at a fixed interval and predicts them by a Taylor expansion. Works with "
                    "any model."),
            Widget("threshold", io.Float, 0.0, {"min": 0.0, "max": 100.0, "step": 0.01, "round": 0.001},
                   "How much may change before a step is computed again. Larger values are faster and less exact. Not "
                   "used by taylorseer. auto (0): the method's default.", automatic=0.0),
            _count("first_steps", 0, "The number of steps at the start that are always computed, for each expert. "
                   "auto (0): the method's default.", automatic=0),
            _count("last_steps", 1, "The number of steps at the end that are always computed."),
            _count("most", 0, "The largest number of steps that may be skipped in a row. auto (0): the method's "
                   "default.", automatic=0),
            _count("interval", 4, "Only for taylorseer: how often a step is computed. 4: one step in four, and the "
                   "other three are predicted.", least=1),
            _count("order", 1, "Only for taylorseer: the order of the Taylor expansion. 0: the last computed step is "
                   "repeated.", most=4),
        ),
        ("teacache", "tea cache", "magcache", "mag cache", "fbcache", "first block cache", "taylorseer", "easycache"),
    ),
    Accelerator(
        "AscendRainFusion",
        "Ascend RainFusion",
        "Sparse self-attention: computes only the products of queries and keys that matter most. The larger the video, "
        "the more it saves. Does not work with ring_degree above 1.",
        "rainfusion",
        (
            _method("version", RAINFUSIONS, "v2", "How the products to compute are chosen. Used with every preset.\n"
                    "v1: each head attends to neighbouring tokens, either in nearby frames or at nearby places in all "
                    "frames.\n"
                    "v2: each block of 2 x 8 x 8 tokens (frames, rows, columns) attends to the blocks that match it "
                    "best.\n"
                    "v3: the same with pairs of tiles of 8 x 8 tokens of one frame."),
            Widget("sparsity", io.Float, 0.64, {"min": 0.0, "max": 0.99, "step": 0.01, "round": 0.001},
                   "The share of the products that is skipped. Larger values are faster and less exact. 0: none."),
            _position("start", "The first sparse step, counted from 0. auto (-1): after a quarter of the steps."),
            _count("refresh", 1, "How many steps in a row use the same choice of products. 1: each step makes its own "
                   "choice.", least=1),
            _count("first_blocks", 0, "The number of blocks at the start of the model that are never sparse."),
            _count("last_blocks", 0, "The number of blocks at the end of the model that are never sparse."),
        ),
        ("sparse attention", "sta", "sliding tile attention", "radial attention", "稀疏注意力"),
    ),
)  # fmt: skip


class AcceleratorNode(io.ComfyNode):
    """What all entries of ACCELERATORS share.

    ComfyUI passes inputs by name and, as validate_inputs takes any name, asks it about all of them.
    """

    accelerator: ClassVar[Accelerator]

    @classmethod
    def define_schema(cls) -> Schema:
        return cls.accelerator.schema()

    @classmethod
    def validate_inputs(cls, acceleration=None, **values) -> bool | str:
        return refusal(cls.accelerator.spec, **values)  # the other accelerator is a link, known when the graph runs

    @classmethod
    def execute(cls, acceleration=None, **values) -> io.NodeOutput:
        earlier = acceleration or AccelerationSpec()
        return io.NodeOutput(earlier.with_accelerator(cls.accelerator.kind, cls.accelerator.spec(**values)))


def _node(accelerator: Accelerator) -> type[AcceleratorNode]:
    return type(accelerator.node_id, (AcceleratorNode,), {"accelerator": accelerator})


NODES = tuple(map(_node, ACCELERATORS))
