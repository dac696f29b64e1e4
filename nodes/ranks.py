"""The group of ranks in a graph: how many, in which plan, and when they free their memory."""

from __future__ import annotations

import time
from functools import partial

from comfy_api.latest import io

from ..ascend_runtime.hardware.devices import DEVICE_KINDS
from ..ascend_runtime.specs import ParallelSpec
from ..ascend_runtime.specs.cluster import cluster_names, read_cluster
from ..ascend_runtime.specs.parallel import MAX_RANKS, RING_EXCHANGES
from . import comfy_bridge, types
from .page.schema import DEVICES, TOOLS, Schema
from .page.validation import refusal
from .types import RanksHandle

THIS_MACHINE = "this machine"  # no name of a cluster has a space


class ParallelConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendParallelConfig",
            display_name="Ascend Parallel Config",
            category=TOOLS,
            search_aliases=[*DEVICES, "parallel", "ranks", "ulysses", "tensor parallel", "fsdp", "并行", "cluster",
                            "multi node", "多机", "集群"],  # fmt: skip
            advanced=("device", "ring_degree", "ring_exchange", "overlap", "cluster"),
            automatic=dict.fromkeys(("ranks", "cfg_degree", "ulysses_degree", "ring_degree"), 0)
            | dict.fromkeys(("fsdp", "overlap"), False),
            description="Sets how many ranks make a video, and how they share the work. What is left automatic is "
            "chosen before each job: the fastest plan that fits, which the sampler shows.",
            inputs=[
                io.Int.Input(
                    "ranks",
                    default=0,
                    min=0,
                    max=MAX_RANKS,
                    tooltip="The number of ranks; a rank is one process on one device. auto (0): one per visible "
                    "device, or one on a CPU; all of a cluster. A graph that was made with auto on eight cards also "
                    "runs on fewer.",
                ),
                io.Int.Input(
                    "cfg_degree",
                    default=0,
                    min=0,
                    max=2,
                    tooltip="2: half of the ranks compute the positive prompt, and half the negative one. 1: all ranks "
                    "compute both. auto (0): chosen before each job.",
                ),
                io.Int.Input(
                    "ulysses_degree",
                    default=0,
                    min=0,
                    max=MAX_RANKS,
                    tooltip="The number of ranks that share the tokens of a video. Around attention they exchange "
                    "tokens for heads. auto (0): chosen before each job. cfg_degree x ring_degree x ulysses_degree x "
                    "tp_degree must equal ranks. If ranks is auto and the product does not fit the number of cards, "
                    "other degrees are used.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(DEVICE_KINDS),
                    default="auto",
                    tooltip="Where the ranks run. auto: on NPUs, else on CUDA devices, else on the CPU.",
                ),
                io.Int.Input(
                    "ring_degree",
                    default=0,
                    min=0,
                    max=MAX_RANKS,
                    optional=True,
                    tooltip="The number of parts that the video's tokens are split into. Their keys and values travel "
                    "from rank to rank. auto (0): 1, unless the other degrees do not use all ranks.",
                ),
                io.Int.Input(
                    "tp_degree",
                    default=1,
                    min=1,
                    max=MAX_RANKS,
                    optional=True,
                    tooltip="Tensor parallelism: the number of slices of the transformer's weights, one per rank. Use "
                    "it if the weights do not fit on a card; of all degrees, it sends the most data. It must divide "
                    "the model's number of heads.",
                ),
                io.Boolean.Input(
                    "fsdp",
                    default=False,
                    optional=True,
                    tooltip="On: each rank keeps a share of the transformer's weights and gathers a block's weights "
                    "when they are needed. auto (off): it is used where the weights do not fit on a card "
                    "otherwise.",
                ),
                io.Combo.Input(
                    "ring_exchange",
                    options=list(RING_EXCHANGES),
                    default="rotate",
                    optional=True,
                    tooltip="How ring_degree sends keys and values. rotate: from neighbour to neighbour. gather: all "
                    "at once, which needs more memory and fewer kernel launches.",
                ),
                io.Boolean.Input(
                    "overlap",
                    default=False,
                    optional=True,
                    tooltip="Sends the heads of ulysses_degree in two parts, one while attention runs on the other. "
                    "auto (off): on NPUs, the environment variable OVERLAP can turn it on as well.",
                ),
                io.Combo.Input(
                    "cluster",
                    options=[THIS_MACHINE, *cluster_names()],
                    default=THIS_MACHINE,
                    optional=True,
                    tooltip="Several machines whose ranks torchrun has started, by the name of the cluster's file on "
                    "this host (docs/machines.md). this machine: only the ranks of this host. The graph contains only "
                    "the name.",
                ),
            ],
            outputs=[
                types.Parallel.Output(
                    display_name="parallel", tooltip="For the Ascend loaders of model, text encoder and VAE."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, ranks, cfg_degree, ulysses_degree, ring_degree=0, tp_degree=1, fsdp=False, ring_exchange="rotate",
        cluster=THIS_MACHINE,
    ) -> bool | str:  # fmt: skip
        values = (ranks, cfg_degree, ulysses_degree, ring_degree, tp_degree, fsdp, ring_exchange)
        return refusal(partial(_handle, device="auto", overlap=False), cluster, *values)

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
        cluster=THIS_MACHINE,
    ) -> io.NodeOutput:
        values = (ranks, cfg_degree, ulysses_degree, ring_degree, tp_degree, fsdp, ring_exchange)
        return io.NodeOutput(_handle(cluster, *values, device=device, overlap=overlap))


def _handle(
    cluster, ranks, cfg_degree, ulysses_degree, ring_degree, tp_degree, fsdp, ring_exchange, *, device, overlap
) -> RanksHandle:
    """Raises ValueError for a plan that cannot be, and for a cluster that is not on this host."""
    parallel = ParallelSpec(
        ranks=ranks,
        cfg_degree=cfg_degree,
        ring_degree=ring_degree,
        ulysses_degree=ulysses_degree,
        tp_degree=tp_degree,
        fsdp=fsdp or None,  # off here: automatic
        ring_exchange=ring_exchange,
        overlap=overlap or None,  # off here: on NPUs the variable OVERLAP decides
    )
    if cluster == THIS_MACHINE:
        return RanksHandle(parallel, device)
    found = read_cluster(f"{cluster}")
    found.require_all(ranks)
    return RanksHandle(parallel, device, found.name)


class FreeMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Schema:
        return Schema(
            node_id="AscendFreeMemory",
            display_name="Ascend Free Memory",
            category=TOOLS,
            search_aliases=["unload", "unload models", "free memory", "vram", "clean", "purge", "npu", "释放显存", "卸载模型"],
            description="Frees the ranks' memory when the graph reaches this node. ComfyUI's Unload Models frees their "
            "weights too.",
            inputs=[
                io.Combo.Input(
                    "what",
                    options=["weights", "ranks"],
                    default="weights",
                    tooltip="weights: frees the weights; the ranks stay and read them again when needed. ranks: ends "
                    "the ranks' processes too; those of a cluster stay, and wait for its next job.",
                ),
                io.AnyType.Input(
                    "anything",
                    optional=True,
                    tooltip="What must be done first, such as the IMAGE of Ascend VAE Decode. It is passed on "
                    "unchanged.",
                ),
            ],
            outputs=[io.AnyType.Output(display_name="anything", tooltip="The input, unchanged.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs) -> float:
        return time.monotonic()  # so that it runs each time the graph does

    @classmethod
    def execute(cls, what, anything=None) -> io.NodeOutput:
        comfy_bridge.release(end_ranks=what == "ranks")
        return io.NodeOutput(anything)
