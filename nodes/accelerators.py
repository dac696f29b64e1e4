"""What Ascend Sampler may leave out: caches and sparse attention. Widgets and presets become descriptions."""

from __future__ import annotations

from comfy_api.latest import io

from ..ascend_runtime.specs import AccelerationSpec
from ..ascend_runtime.specs.acceleration import MAX_STEPS, RAINFUSIONS, STEP_CACHES
from ..ascend_runtime.specs.presets import PRESETS, chosen, describe_presets
from . import types
from .validation import refusal

CUSTOM = "custom"
AUTOMATIC = -1  # of what is counted from 0; else 0 is
ONLY_CUSTOM = " Only for preset custom."


def _preset(kind: str, default: str = "balanced") -> io.Input:
    return io.Combo.Input(
        "preset",
        options=[*PRESETS, CUSTOM],
        default=default,
        tooltip=f"What the widgets below stand for, which are used only with custom.\n{describe_presets(kind)}",
    )


def _number(name: str, default: int, tooltip: str, least: int = 0, most: int = MAX_STEPS) -> io.Input:
    return io.Int.Input(name, default=default, min=least, max=most, optional=True, tooltip=tooltip + ONLY_CUSTOM)


def _window() -> list[io.Input]:
    """Widgets of acceleration.Window."""
    return [
        _number("start", AUTOMATIC, "The step, counted from 0, whose result is the first that is kept; the steps after "
                "it may reuse. -1: 30 % of the steps, as the original's 12 of 40.", least=AUTOMATIC),
        _number("end", AUTOMATIC, "The last step, counted from 0, that may reuse. -1: 92.5 % of the steps, as the "
                "original's 37 of 40.", least=AUTOMATIC),
        _number("interval", 4, "Every so many steps from start on, one computes and the others reuse. 1: none "
                "reuses.", least=1),
        _number("first_block", 0, "The first block of the model that takes part, counted from 0."),
        _number("last_block", AUTOMATIC, "The last block that takes part, counted from 0. -1: the model's last.",
                least=AUTOMATIC),
    ]  # fmt: skip


def _chain() -> io.Input:
    return types.Acceleration.Input(
        "acceleration",
        optional=True,
        tooltip="From another accelerator, to have both. RainFusion goes with any cache; two caches exclude each "
        "other.",
    )


def _outputs() -> list[io.Output]:
    return [
        types.Acceleration.Output(display_name="acceleration", tooltip="For Ascend Sampler, or another accelerator.")
    ]


class AttentionCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendAttentionCache",
            display_name="Ascend AttentionCache",
            category="Ascend",
            description="In some steps, the self-attention of an earlier step is used again. Takes much memory, "
            "changes the video little.",
            inputs=[
                _preset("attention_cache"),
                io.Float.Input(
                    "ratio",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    tooltip="How many times as fast the denoise loop is to be, such as 1.2. start is then the latest "
                    "step, and interval the smallest from the one below, by which it comes to that. 0 or 1: start and "
                    "interval as they are below." + ONLY_CUSTOM,
                ),
                *_window(),
                _chain(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls, preset, ratio=0.0, start=AUTOMATIC, end=AUTOMATIC, interval=4, first_block=0, last_block=AUTOMATIC
    ) -> bool | str:
        return refusal(_attention_cache, preset, ratio, start, end, interval, first_block, last_block)

    @classmethod
    def execute(
        cls,
        preset,
        ratio=0.0,
        start=AUTOMATIC,
        end=AUTOMATIC,
        interval=4,
        first_block=0,
        last_block=AUTOMATIC,
        acceleration=None,
    ) -> io.NodeOutput:
        spec = _attention_cache(preset, ratio, start, end, interval, first_block, last_block)
        return _chained(acceleration, "attention_cache", spec)


class BlockCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendBlockCache",
            display_name="Ascend Block Cache",
            category="Ascend",
            description="In some steps, what a range of blocks added to the video in an earlier step is added again. "
            "Takes little memory.",
            inputs=[_preset("block_cache"), *_window(), _chain()],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls, preset, start=AUTOMATIC, end=AUTOMATIC, interval=4, first_block=0, last_block=AUTOMATIC
    ) -> bool | str:
        return refusal(_block_cache, preset, start, end, interval, first_block, last_block)

    @classmethod
    def execute(
        cls, preset, start=AUTOMATIC, end=AUTOMATIC, interval=4, first_block=0, last_block=AUTOMATIC, acceleration=None
    ) -> io.NodeOutput:
        spec = _block_cache(preset, start, end, interval, first_block, last_block)
        return _chained(acceleration, "block_cache", spec)


class StepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendStepCache",
            display_name="Ascend Step Cache",
            category="Ascend",
            description="Leaves out all blocks of a step as long as little seems to change. Takes little memory, "
            "saves the most.",
            inputs=[
                _preset("step_cache"),
                io.Combo.Input(
                    "method",
                    options=list(STEP_CACHES),
                    default="fbcache",
                    optional=True,
                    tooltip="How it is found out that little changes; used with any preset.\n"
                    "fbcache: by what the first block adds. For any model.\n"
                    "teacache: by the timestep, through a polynomial that was fitted for the model.\n"
                    "magcache: by how much a step is known to change with the model.\n"
                    "taylorseer: not at all; steps between computed ones are predicted by a Taylor expansion.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    optional=True,
                    tooltip="How much may change before a step is computed: more is faster and less exact. Not for "
                    "taylorseer. 0: the method's own." + ONLY_CUSTOM,
                ),
                _number("first_steps", 0, "So many steps at the beginning are always computed. 0: the method's own."),
                _number("last_steps", 1, "So many steps at the end are always computed."),
                _number("most", 0, "So many steps in a row may be left out. 0: the method's own."),
                _number("interval", 4, "taylorseer: every so many steps one is computed.", least=1),
                _number("order", 1, "taylorseer: of the expansion. 0: the last computed step, as it is.", most=4),
                _chain(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls, preset, method="fbcache", threshold=0.0, first_steps=0, last_steps=1, most=0, interval=4, order=1
    ) -> bool | str:
        return refusal(_step_cache, preset, method, threshold, first_steps, last_steps, most, interval, order)

    @classmethod
    def execute(
        cls,
        preset,
        method="fbcache",
        threshold=0.0,
        first_steps=0,
        last_steps=1,
        most=0,
        interval=4,
        order=1,
        acceleration=None,
    ) -> io.NodeOutput:
        spec = _step_cache(preset, method, threshold, first_steps, last_steps, most, interval, order)
        return _chained(acceleration, "step_cache", spec)


class RainFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendRainFusion",
            display_name="Ascend RainFusion",
            category="Ascend",
            description="Self-attention leaves out the products that matter least. Pays for large videos; not with "
            "ring_degree.",
            inputs=[
                _preset("rainfusion"),
                io.Combo.Input(
                    "version",
                    options=list(RAINFUSIONS),
                    default="v2",
                    optional=True,
                    tooltip="What is chosen between; counts for any preset.\n"
                    "v1: each head attends near by, or to a pattern over the whole video.\n"
                    "v2: bricks of 2 x 8 x 8 tokens, those that match best.\n"
                    "v3: tiles of 8 x 8 tokens of a frame; the choice can be kept for several steps.",
                ),
                io.Float.Input(
                    "sparsity",
                    default=0.64,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    round=0.001,
                    optional=True,
                    tooltip="The share of the products that is left out: more is faster and less exact. 0: none."
                    + ONLY_CUSTOM,
                ),
                _number("start", AUTOMATIC, "The first step that is sparse, counted from 0. -1: after a quarter of the "
                        "steps.", least=AUTOMATIC),  # fmt: skip
                _number("refresh", 1, "v3: a choice is kept for so many steps.", least=1),
                _number("first_blocks", 0, "So many blocks at the beginning are always dense."),
                _number("last_blocks", 0, "So many blocks at the end are always dense."),
                _chain(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls, preset, version="v2", sparsity=0.64, start=AUTOMATIC, refresh=1, first_blocks=0, last_blocks=0
    ) -> bool | str:
        return refusal(_rainfusion, preset, version, sparsity, start, refresh, first_blocks, last_blocks)

    @classmethod
    def execute(
        cls,
        preset,
        version="v2",
        sparsity=0.64,
        start=AUTOMATIC,
        refresh=1,
        first_blocks=0,
        last_blocks=0,
        acceleration=None,
    ) -> io.NodeOutput:
        spec = _rainfusion(preset, version, sparsity, start, refresh, first_blocks, last_blocks)
        return _chained(acceleration, "rainfusion", spec)


def _chained(earlier: AccelerationSpec | None, kind: str, spec) -> io.NodeOutput:
    return io.NodeOutput((earlier or AccelerationSpec()).with_accelerator(kind, spec))


def _given(number: int) -> int | None:
    return None if number == AUTOMATIC else number


def _of(kind: str, preset: str, always: dict, custom: dict):
    """The description that a preset stands for. always: values that count for any; custom: those only of custom."""
    if preset not in (*PRESETS, CUSTOM):
        raise ValueError(f"preset is {preset!r}; it can be one of {', '.join((*PRESETS, CUSTOM))}.")
    return chosen(kind, **always, **custom) if preset == CUSTOM else chosen(kind, preset, **always)


def _attention_cache(preset, ratio, start, end, interval, first_block, last_block):
    window = _window_values(start, end, interval, first_block, last_block)
    return _of("attention_cache", preset, {}, {"ratio": ratio or None, **window})


def _block_cache(preset, start, end, interval, first_block, last_block):
    return _of("block_cache", preset, {}, _window_values(start, end, interval, first_block, last_block))


def _window_values(start, end, interval, first_block, last_block) -> dict:
    return {"start": _given(start), "end": _given(end), "interval": interval, "first_block": first_block,
            "last_block": _given(last_block)}  # fmt: skip


def _step_cache(preset, method, threshold, first_steps, last_steps, most, interval, order):
    given = {"threshold": threshold, "first_steps": first_steps, "most": most}
    custom = {name: value for name, value in given.items() if value}  # 0: the method's own
    custom |= {"last_steps": last_steps, "interval": interval, "order": order}
    return _of("step_cache", preset, {"method": method}, custom)


def _rainfusion(preset, version, sparsity, start, refresh, first_blocks, last_blocks):
    custom = {"sparsity": sparsity, "start": _given(start), "refresh": refresh, "first_blocks": first_blocks,
              "last_blocks": last_blocks}  # fmt: skip
    return _of("rainfusion", preset, {"version": version}, custom)
