"""How fast a machine computes, sends and reads: published figures of cards, and those that were measured here.

All rates are costs: seconds for each of UNITS. A published figure is its maker's peak; an efficiency, fitted to one
published time of a whole video, says how much of the peak a video model reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# What a prediction counts -> the unit. Costs are seconds for each.
UNITS = {
    "products": "FLOP of attention's products with each other",
    "merged": "FLOP of such products in a ring, whose parts are merged",
    "linear": "FLOP of other matrix products",
    "traffic": "byte of tokens between two blocks",
    "blocks": "pass through a block",
    "steps": "step",
    "ulysses": "byte sent for heads",
    "ring": "byte of keys and values sent",
    "sequence": "byte of velocity sent",
    "cfg": "byte of a branch sent",
    "tp": "byte of slices sent",
    "fsdp": "byte of weights sent",
    "exchanges": "exchange of velocities",
    "ulysses_exchanges": "exchange of heads",
    "ring_exchanges": "exchange of a ring",
    "tp_exchanges": "exchange of slices",
    "fsdp_exchanges": "gather of a block's weights",
    "swap": "byte of an expert copied from the host",
    "encode": "FLOP of a text encoder on the host",
    "encode_ranks": "FLOP of a text encoder on a rank",
    "decode": "FLOP of the VAE",
    "frames": "byte of frames written",
    "read": "byte read from disk",
    "copied": "byte of weights that a rank puts into their place",
    "load_job": "loading",
    "encode_job": "prompt",
    "denoise_job": "denoise loop",
    "decode_job": "decoded video",
}
# Axis -> the unit of its exchanges.
EXCHANGES = {"cfg": "exchanges", "sequence": "exchanges"} | {
    axis: f"{axis}_exchanges" for axis in ("ulysses", "ring", "tp", "fsdp")
}
LATENCY = 20e-6  # of an exchange: the order that HCCL's and NCCL's own tests show for small messages
LAUNCHES = 60e-6  # of a block: about 20 operators, each a few microseconds on the host
STEP = 5e-3  # of a step outside of blocks: the solver, and a preview
FRAME_BANDWIDTH = 2e9  # bytes of frames a second that a host writes: one core's copy
HOST_FLOPS, DISK = 1e12, 2e9  # an assumption for a server's CPU and its disk; `plan --measure` replaces it
COPY = 5e9  # bytes of weights a second that a rank converts and sends to its device: an assumption
JOB = 0.05  # of a stage, besides all that is counted: an assumption
CONVOLUTIONS = 0.25  # an assumption: the efficiency of 3-D convolutions, relative to that of matrix products
PCIE = 25e9  # bytes a second from a host's pinned memory over PCIe 4.0 x16, whose peak is 31.5e9 (PCI-SIG)


@dataclass(frozen=True)
class Card:
    """Published figures of a device.

    peak: FLOP/s of dense bf16 matrix products. memory: bytes. bandwidth: of the memory, bytes/s. link: bytes/s that a
    card sends to others of its host. efficiency: of `peak`, in a whole video. sources: where the figures come from.
    """

    title: str
    kind: str
    peak: float
    memory: int
    bandwidth: float
    link: float
    efficiency: float
    sources: str


_NVLINK = "half of NVLink's published bidirectional bandwidth"
CARD_FIGURES = {
    "a2": Card(
        "Ascend 910B (Atlas 800 A2)", "npu", 313e12, 64 * 2**30, 1.6e12, 100e9, 0.5,
        "peak: 2.5 PFLOPS of an Atlas 800T A2 with 8 NPUs, and 64 GB HBM each (Huawei's data sheet); links: half of "
        "its 392 GB/s in both directions, of which MindIE's table of plans shows half, whatever the number of cards",
    ),
    "a3": Card(
        "Ascend 910_93, one die (Atlas 800 A3)", "npu", 376e12, 64 * 2**30, 1.6e12, 196e9, 0.44,
        "arXiv 2506.12708 (Serving Large Language Models on Huawei CloudMatrix384): for each die of a 910C 376 TFLOPS "
        "in bf16, 64 GB, 1.6 TB/s, and 196 GB/s in one direction",
    ),
    "950": Card(
        "Ascend 950PR", "npu", 500e12, 128 * 2**30, 1.6e12, 1e12, 0.47,
        "Huawei Connect 2025, keynote of Xu Zhijun: 1 PFLOPS in FP8, of which bf16 is taken as half, 128 GB, 1.6 TB/s, "
        "2 TB/s between chips in both directions",
    ),
    "h100": Card(
        "NVIDIA H100 SXM", "cuda", 989e12, 80 * 10**9, 3.35e12, 450e9, 0.33,
        "NVIDIA's data sheet of H100 SXM: 1979 TFLOPS in bf16 with sparsity, half without, 80 GB, 3.35 TB/s; "
        f"{_NVLINK} of 900 GB/s",
    ),
    "h200": Card(
        "NVIDIA H200 SXM", "cuda", 989e12, 141 * 10**9, 4.8e12, 450e9, 0.33,
        f"NVIDIA's data sheet of H200 SXM: as H100, 141 GB, 4.8 TB/s; {_NVLINK}, 900 GB/s; efficiency as H100",
    ),
    "h20": Card(
        "NVIDIA H20", "cuda", 148e12, 96 * 10**9, 4.0e12, 450e9, 0.62,
        f"NVIDIA's data sheet of H20: 148 TFLOPS in bf16, 96 GB, 4.0 TB/s; {_NVLINK}, 900 GB/s",
    ),
    "b200": Card(
        "NVIDIA B200 SXM", "cuda", 2250e12, 180 * 10**9, 7.7e12, 900e9, 0.33,
        f"NVIDIA's data sheet of HGX B200: 2.25 PFLOPS in bf16 without sparsity, 180 GB, 7.7 TB/s; {_NVLINK}, "
        "1.8 TB/s; efficiency as H100",
    ),
    "cpu": Card(
        "CPU, 8 cores", "cpu", 0.5e12, 0, 20e9, 5e9, 0.5,
        "an estimate for 8 cores with AVX2 at 2 GHz (16 fp32 multiply-adds a cycle), two channels of DDR4-2666 and "
        "Gloo on loopback; measure this host instead: python -m ascend_runtime plan MODEL --measure",
    ),
}  # fmt: skip


def gpu_named(name: str) -> str:
    """The key in CARD_FIGURES of a GPU, by its driver's name; of an unknown one that of the most common."""
    gpus = (card for card, figures in CARD_FIGURES.items() if figures.kind == "cuda")
    return next((card for card in gpus if card in name.lower()), "h100")


@dataclass(frozen=True)
class Rates:
    """Costs in seconds for each of UNITS.

    source: where the figures come from. hides: whether exchanges run while a rank computes. measured: costs by number
    of ranks, which share this host's cores; empty for published figures.
    """

    source: str
    costs: Mapping[str, float] = field(default_factory=dict)
    hides: bool = False
    measured: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def on(self, ranks: int) -> Mapping[str, float]:
        """The costs on a host that runs this number of ranks. Raises ValueError if that was not measured."""
        if not self.measured:
            return self.costs
        if ranks not in self.measured:
            known = ", ".join(map(str, sorted(self.measured)))
            raise ValueError(
                f"This host was measured with {known} rank(s), which share its cores, and not with {ranks}. Measure it "
                f"with that number too: python -m ascend_runtime plan MODEL --measure --ranks {ranks}"
            )
        return self.measured[ranks]


def of_card(card: str, efficiency: float | None = None) -> Rates:
    """Published figures of a card. efficiency: None is the card's own. Raises ValueError for an unknown card."""
    if card not in CARD_FIGURES:
        raise ValueError(f"There are no figures of a card {card!r}; it can be one of {', '.join(CARD_FIGURES)}.")
    facts = CARD_FIGURES[card]
    if efficiency is not None:
        facts = replace(facts, efficiency=efficiency)
    flop, byte = 1 / (facts.peak * facts.efficiency), 1 / facts.link
    host = 1 / HOST_FLOPS
    return Rates(
        source=f"published figures of {facts.title}: {facts.sources}",
        costs={
            "products": flop,
            "merged": flop,
            "linear": flop,
            "traffic": 20 / facts.bandwidth,  # norms, modulation, rotary embedding and residuals read and write
            "blocks": LAUNCHES,
            "steps": STEP,
            **dict.fromkeys(("ulysses", "ring", "sequence", "cfg", "tp", "fsdp"), byte),
            **dict.fromkeys(EXCHANGES.values(), LATENCY),
            "swap": 1 / PCIE,
            "encode": flop if facts.kind == "cpu" else host,
            "encode_ranks": flop,
            "decode": flop / CONVOLUTIONS,
            "frames": 1 / FRAME_BANDWIDTH,
            "read": 1 / DISK,
            "copied": 1 / COPY,
            **dict.fromkeys(("load_job", "encode_job", "denoise_job", "decode_job"), JOB),
        },
        hides=facts.kind == "cuda",  # published times of 8 A2 with FSDP contain its gathers in full
    )
