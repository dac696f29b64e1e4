"""The group of ranks as the graph sees it: how many, in which plan, and when they give their memory back."""

from __future__ import annotations

import time
from functools import partial

from comfy_api.latest import io

from ..ascend_runtime.hardware.devices import DEVICE_KINDS
from ..ascend_runtime.specs import ParallelSpec
from ..ascend_runtime.specs.parallel import MAX_RANKS, RING_EXCHANGES
from . import comfy_bridge, types
from .types import RanksHandle
from .validation import refusal


class ParallelConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendParallelConfig",
            display_name="Ascend Parallel Config",
            category="Ascend",
            description="Says on how many ranks a video is made, and how they share it. All zeros fit any machine.",
            inputs=[
                io.Int.Input(
                    "ranks",
                    default=0,
                    min=0,
                    max=MAX_RANKS,
                    tooltip="Processes, one a device. 0: as many as there are visible devices, one on a CPU. "
                    "A graph with 0 made for eight cards runs on fewer.",
                ),
                io.Int.Input(
                    "cfg_degree",
                    default=0,
                    min=0,
                    max=2,
                    tooltip="2: the positive and the negative prompt are computed on different ranks. 0: automatic.",
                ),
                io.Int.Input(
                    "ulysses_degree",
                    default=0,
                    min=0,
                    max=MAX_RANKS,
                    tooltip="Ranks that share the tokens of one video and exchange them for heads. 0: automatic. "
                    "cfg_degree x ring_degree x ulysses_degree x tp_degree must equal ranks; where ranks is 0, the "
                    "degrees are a wish that fewer cards may not fulfil.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICE_KINDS),
                    default="auto",
                    tooltip="auto: NPUs, else CUDA devices, else the CPU.",
                ),
                io.Int.Input(
                    "ring_degree",
                    default=0,
                    min=0,
                    max=MAX_RANKS,
                    optional=True,
                    tooltip="Parts of the video whose keys and values travel from rank to rank. 0: automatic, which "
                    "is 1 unless the other degrees leave ranks over.",
                ),
                io.Int.Input(
                    "tp_degree",
                    default=1,
                    min=1,
                    max=MAX_RANKS,
                    optional=True,
                    tooltip="Slices of the transformer's weights, one a rank. It sends the most: for weights that do "
                    "not fit. It must divide the model's heads.",
                ),
                io.Boolean.Input(
                    "fsdp",
                    default=False,
                    optional=True,
                    tooltip="Each rank keeps a share of the transformer's weights and fetches a block when it is "
                    "needed: for weights that do not fit.",
                ),
                io.Combo.Input(
                    "ring_exchange",
                    options=list(RING_EXCHANGES),
                    default="rotate",
                    optional=True,
                    tooltip="rotate: keys and values go from neighbour to neighbour. gather: all at once, which takes "
                    "more memory and fewer steps.",
                ),
                io.Boolean.Input(
                    "overlap",
                    default=False,
                    optional=True,
                    tooltip="Heads of ulysses_degree travel in two parts, one while the attention of the other runs.",
                ),
            ],
            outputs=[types.Parallel.Output(display_name="parallel", tooltip="For the three Ascend loaders.")],
        )

    @classmethod
    def validate_inputs(
        cls, ranks, cfg_degree, ulysses_degree, ring_degree=0, tp_degree=1, fsdp=False, ring_exchange="rotate"
    ) -> bool | str:
        values = (ranks, cfg_degree, ulysses_degree, ring_degree, tp_degree, fsdp, ring_exchange)
        return refusal(partial(_spec, overlap=False), *values)

    @classmethod
    def execute(
        cls,
        ranks,
        cfg_degree,
        ulysses_degree,
        device,
        ring_degree=0,
        tp_degree=1,
        fsdp=False,
        ring_exchange="rotate",
        overlap=False,
    ) -> io.NodeOutput:
        parallel = _spec(ranks, cfg_degree, ulysses_degree, ring_degree, tp_degree, fsdp, ring_exchange, overlap)
        return io.NodeOutput(RanksHandle(parallel, device))


def _spec(ranks, cfg_degree, ulysses_degree, ring_degree, tp_degree, fsdp, ring_exchange, overlap) -> ParallelSpec:
    return ParallelSpec(
        ranks=ranks,
        cfg_degree=cfg_degree,
        ring_degree=ring_degree,
        ulysses_degree=ulysses_degree,
        tp_degree=tp_degree,
        fsdp=fsdp,
        ring_exchange=ring_exchange,
        overlap=overlap or None,  # not asked for here: the variable OVERLAP may, on NPUs
    )


class FreeMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AscendFreeMemory",
            display_name="Ascend Free Memory",
            category="Ascend",
            description="Gives the ranks' memory back when it is reached. ComfyUI's own Unload Models does so too.",
            inputs=[
                io.Combo.Input(
                    "what",
                    options=["weights", "ranks"],
                    default="weights",
                    tooltip="weights: the ranks stay and read them again when needed. ranks: the processes end.",
                ),
                io.AnyType.Input(
                    "anything",
                    optional=True,
                    tooltip="What must be ready first, such as the IMAGE of Ascend VAE Decode; it is passed on.",
                ),
            ],
            outputs=[io.AnyType.Output(display_name="anything", tooltip="What came in.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return time.monotonic()  # it acts each time the graph runs

    @classmethod
    def execute(cls, what, anything=None) -> io.NodeOutput:
        comfy_bridge.release(end_ranks=what == "ranks")
        return io.NodeOutput(anything)
