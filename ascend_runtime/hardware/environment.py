"""The environment of ranks as data: what is set on an NPU, what is legal, and the variables of the original systems.

Nothing here is exported into this process: a group's environment is a dictionary that its ranks are started with.

A variable that is set and empty counts as one that is not set, and does not reach the ranks.

Sources: "torch_npu" is the wheel 2.13.0 (its library's own messages, its headers and Python files), "CANN" is the
CANN and HCCL reference of environment variables (releases 8.0 to 9.1), "MindIE" the Wan systems of MindIE as they
document their process.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Callable, Mapping

from msgspec.structs import replace

from ..specs import OperatorSpec, ParallelSpec, TextEncoderSpec
from . import cores, host

logger = logging.getLogger(__name__)


# What is legal


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    values: tuple[str, ...]

    def admits(self, value: str) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high, both legal."""

    low: int
    high: int = 2**31 - 1

    def admits(self, value: str) -> bool:
        return re.fullmatch("[0-9]{1,18}", value) is not None and self.low <= int(value) <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Seconds:
    """Seconds from 0 to high, both legal, with two decimals at most."""

    high: int

    def admits(self, value: str) -> bool:
        return re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,2})?", value) is not None and float(value) <= self.high

    def __str__(self) -> str:
        return f"a number of seconds from 0 to {self.high}, with two decimals at most"


@dataclass(frozen=True)
class Form:
    """A text of a form, which `words` describe."""

    words: str
    admits: Callable[[str], bool]

    def __str__(self) -> str:
        return self.words


Legal = Choice | Whole | Seconds | Form
FLAG = Choice(("0", "1"))
LONGEST_WAIT = 2**31 - 1  # seconds

_NATURAL, _FRACTION, _TRUTH = r"[0-9]+", r"0?\.[0-9]+|0|1(\.0+)?", "True|False"
# torch_npu: NPUAllocatorConfig.h, and the keys of torch's own AcceleratorAllocatorConfig.
_ALLOCATOR_KEYS = {
    "base_addr_aligned_kb": r"[0-9]|1[0-6]",
    "expandable_segments": _TRUTH,
    "garbage_collection_threshold": _FRACTION,
    "large_segment_size_mb": _NATURAL,
    "max_non_split_rounding_mb": _NATURAL,
    "max_split_size_mb": _NATURAL,
    "multi_stream_lazy_reclaim": _TRUTH,
    "page_size": "1g",
    "per_process_memory_fraction": _FRACTION,
    "pin_memory_expandable_segments": _TRUTH,
    "pinned_max_cached_size_mb": _NATURAL,
    "pinned_max_round_threshold_mb": _NATURAL,
    "pinned_mem_register": _TRUTH,
    "pinned_reserve_segment_size_mb": _NATURAL,
    "pinned_use_background_threads": _TRUTH,
    "release_lock_on_npumalloc": _TRUTH,
    "roundup_power2_divisions": r"[0-9]+|\[.+\]",
    "segment_size_mb": _NATURAL,
    "throw_on_npumalloc_oom": _TRUTH,
}


def _is_allocator_setting(value: str) -> bool:
    settings = [pair.strip().partition(":") for pair in re.split(r",(?![^\[]*\])", value)]
    if not all(re.fullmatch(_ALLOCATOR_KEYS.get(key, "(?!)"), text) for key, _, text in settings):
        return False
    given = {key: text for key, _, text in settings}
    splits = given.keys() & {"max_split_size_mb", "garbage_collection_threshold"}
    return not (splits and given.get("expandable_segments") == "True")


def _is_port_ranges(value: str) -> bool:
    """A port, or several and ranges of them that do not overlap."""
    parts = [re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part) for part in value.split(",")]
    if not all(parts):
        return value == "auto"
    ranges = sorted((int(part[1]), int(part[2] or part[1])) for part in parts)
    apart = all(last < first for (_, last), (first, _) in zip(ranges, ranges[1:]))
    return apart and all(1 <= first <= last <= 65535 for first, last in ranges)


def _is_card_list(value: str) -> bool:
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", value):
        return False
    cards = [int(card) for card in value.split(",")]
    return all(a < b for a, b in zip(cards, cards[1:]))


def _is_affinity(value: str) -> bool:
    if not re.fullmatch(r"[012](,(npu[0-9]{1,2}:[0-9]+-[0-9]+|(force|npu_affine|bind_irq|lazy_bind):[01]))*", value):
        return False
    return all(int(low) <= int(high) for low, high in re.findall(r":([0-9]+)-([0-9]+)", value))


def _is_tokenizers_truth(value: str) -> bool:
    return value.lower() in ("off", "false", "f", "no", "n", "0", "on", "true", "t", "yes", "y", "1")


ALLOCATOR = Form(
    f"comma-separated key:value with the keys {', '.join(_ALLOCATOR_KEYS)}, such as expandable_segments:True; "
    "expandable_segments:True excludes max_split_size_mb and garbage_collection_threshold",
    _is_allocator_setting,
)
AFFINITY = Form(
    "0 (none), 1 (coarse) or 2 (fine), and then, where wanted, npuN:FIRST-LAST for the cores of card N, force:0/1, "
    "npu_affine:0/1, bind_irq:0/1, lazy_bind:0/1, separated by commas, such as 1,npu0:0-1,npu1:2-5",
    _is_affinity,
)
CARDS = Form("card numbers in rising order, separated by commas alone, such as 0,1,2,3", _is_card_list)
PORTS = Form(
    "auto, or ports and ranges of ports from 1 to 65535 that do not overlap, separated by commas, such as "
    "61000,61050-61100",
    _is_port_ranges,
)
TRUTH = Form("false or true, in any case, or no, off, 0, yes, on, 1", _is_tokenizers_truth)


# The tables


@dataclass(frozen=True)
class Variable:
    """A variable of the ranks' environment.

    legal: on all cards that `on` does not name, and where it is not known which cards there are.
    default: what ranks get where nobody set it; None: nothing.
    unless: another variable that, where it is set, keeps the default away.
    remarks: what the log says of a value.
    on: what is legal on the cards of a line (see `host.line`).
    not_for: lines whose cards do not have it, so that they get no default.
    """

    name: str
    legal: Legal
    meaning: str
    source: str
    default: str | None = None
    unless: str | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)
    on: Mapping[str, Legal] = field(default_factory=dict)
    not_for: tuple[str, ...] = ()

    def legal_on(self, line: str | None) -> Legal:
        """What is legal on the cards of a line; None: of an unknown one."""
        return self.on.get(line, self.legal)


# A CPU's ranks keep what is freed within a job for the next tensors: glibc's malloc otherwise maps every large one
# anew, and the kernel clears its pages, which took a third of a VAE's time. `devices.empty_cache` gives it back.
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

NPU = (
    Variable("PYTORCH_NPU_ALLOC_CONF", ALLOCATOR, "the allocator of device memory; segments that grow fragment less",
             "torch_npu; MindIE", "expandable_segments:True", unless="PYTORCH_ALLOC_CONF"),
    Variable("PYTORCH_ALLOC_CONF", ALLOCATOR, "the same under torch's own name; one of both", "torch_npu"),
    Variable("TASK_QUEUE_ENABLE", Choice(("0", "1", "2")), "levels of the queue that launches operators",
             "torch_npu; MindIE", "2"),
    Variable("CPU_AFFINITY_CONF", AFFINITY, "which cores the threads of a rank are bound to", "torch_npu; MindIE", "1"),
    Variable("TOKENIZERS_PARALLELISM", TRUTH, "whether tokenizers start threads", "tokenizers; MindIE", "false"),
    # Half an hour, as long as torch.distributed itself waits. Ranks load their weights, each at the speed of its disk,
    # before they first meet in HCCL, and 120 s, HCCL's own default, is less than that may take. A long wait hides
    # nothing: the death of a rank is seen by its process, not by this clock.
    Variable("HCCL_CONNECT_TIMEOUT", Whole(120, 7200), "seconds that ranks wait for each other to connect",
             "CANN", "1800"),
    # By card: CANN's page of this variable (envref_07_0078). The older cards wait in steps of 68 s that their hardware
    # counts; 68 to 17340 for all was CANN 6.0's. What exceeds 1091 s HCCL takes as 1091 where an exchange runs as AIV.
    Variable("HCCL_EXEC_TIMEOUT", Seconds(LONGEST_WAIT), "seconds that a rank waits in an exchange; 0: without end, "
             "but on the oldest cards", "CANN", "1800",
             on={"a5": Whole(0, LONGEST_WAIT), **dict.fromkeys(("duo", "910"), Whole(1, 17340))}),
    # HCCL's documented cure of the root info's error code 7, a port that is bound already: two processes on one card.
    Variable("HCCL_HOST_SOCKET_PORT_RANGE", PORTS, "ports of the host over which ranks find each other", "CANN",
             "auto", unless="HCCL_IF_BASE_PORT", not_for=("duo", "910")),
    Variable("HCCL_NPU_SOCKET_PORT_RANGE", PORTS, "ports of the cards' own network", "CANN", "auto",
             not_for=("duo", "910")),
    Variable("HCCL_IF_BASE_PORT", Whole(1024, 65520), "first of 32 ports of the host, in older CANN of 16 (HCCL's "
             "own: 60000)", "CANN"),
    Variable("HCCL_BUFFSIZE", Whole(1), "MB of device memory that an exchange is buffered in", "torch_npu; CANN"),
    Variable("P2P_HCCL_BUFFSIZE", Whole(0), "the same for exchanges of two ranks", "torch_npu"),
    Variable("ASCEND_RT_VISIBLE_DEVICES", CARDS, "the cards of this process", "torch_npu: others are dropped; CANN"),
    Variable("ASCEND_LAUNCH_BLOCKING", FLAG, "operators one after the other, for debugging", "torch_npu",
             remarks={"1": "operators run one after the other, whatever TASK_QUEUE_ENABLE says: for debugging, slow"}),
    Variable("MINDIE_SD_FA_TYPE", Choice(("prompt_flash_attn", "fused_attn_score", "ascend_laser_attention")),
             "the attention that MindIE SD takes where laser is asked for", "mindiesd",
             remarks=dict.fromkeys(("prompt_flash_attn", "fused_attn_score"), "attention laser computes by this")),
    Variable("ASCEND_SLOG_PRINT_TO_STDOUT", FLAG, "CANN's log on the screen", "CANN"),
    Variable("ASCEND_GLOBAL_LOG_LEVEL", Whole(0, 4), "CANN's log: 0 debug, 1 info, 2 warning, 3 error, 4 none", "CANN"),
    Variable("COMBINED_ENABLE", FLAG, "merges pairs of operators on memory that is not contiguous", "torch_npu"),
    Variable("ACLNN_CACHE_LIMIT", Whole(1, 10_000_000), "operators whose preparation is kept", "CANN"),
    Variable("MULTI_STREAM_MEMORY_REUSE", Choice(("0", "1", "2", "3")), "memory shared by streams", "torch_npu"),
    Variable("NPU_ASD_ENABLE", Choice(("0", "1", "2", "3")), "detection of suspicious values", "torch_npu"),
    Variable("INF_NAN_MODE_ENABLE", FLAG, "1: overflow is inf, 0: the largest number (old cards)", "torch_npu"),
    Variable("INF_NAN_MODE_FORCE_DISABLE", FLAG, "1 forces INF_NAN_MODE_ENABLE=0 on newer cards", "torch_npu"),
)  # fmt: skip

# These steer OperatorSpec, TextEncoderSpec, or things that are settled here, on NPUs. Their names are common words,
# which other software uses too: on a CPU and CUDA they are not looked at.
ORIGINAL = (
    Variable("ALGO", Choice(("0", "1", "3")), "attention: 0 fused, 1 laser, 3 infer", "MindIE"),
    Variable("FAST_LAYERNORM", FLAG, "layer norm: 0 upcast to fp32, 1 fused", "MindIE"),
    Variable("USE_SUB_HEAD", Whole(0, 1024), "heads that one attention call computes; 0: all", "MindIE"),
    Variable("PRECISION", FLAG, "1: noise drawn on the CPU", "MindIE",
             remarks={"0": "noise is drawn on the CPU all the same, so that a seed means one video everywhere"}),
    Variable("T5_LOAD_CPU", FLAG, "the text encoder: 1 on one rank's CPU, 0 on the devices of all ranks", "MindIE"),
    Variable("OVERLAP", FLAG, "1: Ulysses' exchange travels while attention computes", "MindIE"),
    Variable("ROPE_OPT", FLAG, "fused rotary embedding", "MindIE",
             remarks=dict.fromkeys("01", "no such choice is needed; it is fused where the card can")),
    Variable("ADA_LAYERNORM", FLAG, "layer norm fused with its modulation", "MindIE",
             remarks=dict.fromkeys("01", "no such choice is needed; they are fused where the card can")),
    Variable("QUANT_ALLTOALL", FLAG, "int8 exchange of Ulysses", "MindIE",
             remarks=dict.fromkeys("01", "no such choice is needed; Ulysses exchanges numbers as they are")),
)  # fmt: skip

START_DEADLINE = "ASCEND_RUNTIME_START_DEADLINE"
# Where one of these is empty, it is as if it were not set.
NAMES = {row.name for row in (*NPU, *ORIGINAL)} | {*HEAP, START_DEADLINE, cores.THREADS, "OMP_WAIT_POLICY"}

_ATTENTION_OF = {"0": "fused", "1": "laser", "3": "infer"}
_LAYER_NORM_OF = {"0": "fp32", "1": "fused"}


# What ranks get


def original(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the original systems that count on this kind of device: those that are set, and only on NPUs."""
    rows = ORIGINAL if kind == "npu" else ()
    return {row.name: environ[row.name] for row in rows if environ.get(row.name)}


def with_defaults(spec: OperatorSpec, environ: Mapping[str, str]) -> OperatorSpec:
    """`spec` with every choice made: what it leaves open (auto, 0) is what ALGO, FAST_LAYERNORM and USE_SUB_HEAD ask
    for, else fused attention, all heads at once, fused layer norm.

    environ: as `original` gives it, here and below.

    Raises ValueError for a variable of the original systems that has no legal value.
    """
    _raise(_wrong(ORIGINAL, environ, {}))
    attention, layer_norm = spec.attention, spec.layer_norm
    return replace(
        spec,
        attention=_ATTENTION_OF[environ.get("ALGO", "0")] if attention == "auto" else attention,
        layer_norm=_LAYER_NORM_OF[environ.get("FAST_LAYERNORM", "1")] if layer_norm == "auto" else layer_norm,
        heads_per_call=spec.heads_per_call or int(environ.get("USE_SUB_HEAD", "0")),
    )


def overlaps(spec: ParallelSpec, environ: Mapping[str, str]) -> bool:
    """Whether Ulysses' exchange travels while attention computes: as `spec` says, else as OVERLAP asks for, else not.

    Raises ValueError for an OVERLAP that is neither 0 nor 1.
    """
    _raise(_wrong(ORIGINAL, environ, {}))
    return environ.get("OVERLAP", "0") == "1" if spec.overlap is None else spec.overlap


def placed(spec: TextEncoderSpec, environ: Mapping[str, str]) -> TextEncoderSpec:
    """`spec` with its placement chosen: where it is auto, what T5_LOAD_CPU asks for, else cpu.

    Raises ValueError for a T5_LOAD_CPU that is neither 0 nor 1.
    """
    _raise(_wrong(ORIGINAL, environ, {}))
    asked = "cpu" if environ.get("T5_LOAD_CPU", "1") == "1" else "ranks"
    return replace(spec, placement=asked if spec.placement == "auto" else spec.placement)


def rank_environment(kind: str, environ: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The variables that a group's ranks start with, but for those that tell ranks apart.

    own: of this runtime (its `environment`). It goes before `environ`, the user's, and that before our defaults.
    On a CPU and CUDA the variables of the NPU and of the original systems are neither set nor looked at.

    Raises ValueError that names every variable without a legal value, what is legal, and where it was set.
    """
    given = {name: value for name, value in {**environ, **own}.items() if value or name not in NAMES}
    if kind == "npu":
        return _on_npus(given, own, host.line())
    if strange := [f"{row.name}={given[row.name]}" for row in ORIGINAL if row.name in given]:
        logger.debug("on %s these variables, which an NPU's ranks heed, change nothing: %s", kind, ", ".join(strange))
    return given


def _on_npus(given: dict[str, str], own: Mapping[str, str], line: str | None) -> dict[str, str]:
    """The same on cards of a line: `given`, checked, with our defaults."""
    wrong = _wrong((*NPU, *ORIGINAL), given, own, line)
    if {"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} <= given.keys():
        wrong.append("PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set, of which torch_npu takes one: "
                     "unset one of them.")  # fmt: skip
    _raise(wrong)
    rows = [row for row in NPU if row.default is not None and row.unless not in given and line not in row.not_for]
    chosen = {**{row.name: row.default for row in rows}, **given}
    origins = [(row.name, "default" if row.name not in given else "given") for row in NPU if row.name in chosen]
    logger.info("ranks on npu: %s", ", ".join(f"{name}={chosen[name]} ({origin})" for name, origin in origins))
    for row in (*NPU, *ORIGINAL):
        if remark := row.remarks.get(given.get(row.name, "")):
            logger.info("%s=%s: %s.", row.name, given[row.name], remark)
    return chosen


def start_deadline(environ: Mapping[str, str]) -> float:
    """Seconds until all ranks must be ready: what ASCEND_RUNTIME_START_DEADLINE asks for, else 300.

    Raises ValueError where that is no positive number.
    """
    asked = environ.get(START_DEADLINE, "").strip() or "300"
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", asked) or float(asked) == 0:
        raise ValueError(f"{START_DEADLINE} is {asked!r}; it can be the number of seconds in which all ranks must be "
                         "ready, such as 600. Unset it for 300.")  # fmt: skip
    return float(asked)


def _wrong(
    table: tuple[Variable, ...], given: Mapping[str, str], own: Mapping[str, str], line: str | None = None
) -> list[str]:
    """A sentence for each variable of the table that has no legal value on cards of this line; `own` says which are
    the runtime's."""
    return [
        f"{row.name} is {given[row.name]!r}; it can be {row.legal_on(line)} ({row.meaning}). " + (
            "Change it in the runtime's environment (`Runtime(environment=...)`)." if row.name in own else
            f"Where this process is started, `export {row.name}=VALUE` or `unset {row.name}`."
        )
        for row in table
        if given.get(row.name) and not row.legal_on(line).admits(given[row.name])
    ]  # fmt: skip


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise ValueError("\n".join(wrong))
