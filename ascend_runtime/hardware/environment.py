"""Tables of the ranks' environment variables: defaults on NPUs, valid values, and the original systems' variables.

The environment of this process does not change; ranks are started with a dictionary. A variable that is set but empty
counts as unset, and is not passed to the ranks.

Sources: "torch_npu" is the wheel 2.13.0 (messages of its library, its headers and Python files), "CANN" is the
reference of CANN's and HCCL's environment variables (releases 8.0 to 9.1), "MindIE" is the documentation of MindIE's
Wan systems.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Callable, Mapping

from msgspec.structs import replace

from ..errors import coded
from ..specs import OperatorSpec, ParallelSpec, TextEncoderSpec
from . import cores, host

logger = logging.getLogger(__name__)


# Valid values


@dataclass(frozen=True)
class OneOf:
    """One of several words."""

    values: tuple[str, ...]

    def admits(self, value: str) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"


@dataclass(frozen=True)
class WholeNumber:
    """A whole number from low to high, both included."""

    low: int
    high: int = 2**31 - 1

    def admits(self, value: str) -> bool:
        return re.fullmatch("[0-9]{1,18}", value) is not None and self.low <= int(value) <= self.high

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"


@dataclass(frozen=True)
class Seconds:
    """Seconds from 0 to high, both included, with at most two decimals."""

    high: int

    def admits(self, value: str) -> bool:
        return re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,2})?", value) is not None and float(value) <= self.high

    def __str__(self) -> str:
        return f"a number of seconds from 0 to {self.high}, with at most two decimals"


@dataclass(frozen=True)
class Form:
    """A text in a format that `words` describe."""

    words: str
    admits: Callable[[str], bool]

    def __str__(self) -> str:
        return self.words


Legal = OneOf | WholeNumber | Seconds | Form
FLAG = OneOf(("0", "1"))
LONGEST_WAIT = 2**31 - 1  # seconds

_NATURAL, _FRACTION, _TRUTH = r"[0-9]+", r"0?\.[0-9]+|0|1(\.0+)?", "True|False"
# torch_npu: NPUAllocatorConfig.h, and the keys of torch's own AcceleratorAllocatorConfig. Older ones end a rank at its
# start by a key that they do not know, so a default must contain only what 2.7.1 and 2.9.0 take. Those lack
# large_segment_size_mb, max_non_split_rounding_mb, per_process_memory_fraction, release_lock_on_npumalloc,
# throw_on_npumalloc_oom and pinned_{max_cached_size_mb,max_round_threshold_mb,reserve_segment_size_mb}, and before
# 2.7.1.post8 and 2.9.0.post6 also multi_stream_lazy_reclaim and all other pin* keys.
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
    """Ports and ranges of ports that do not overlap."""
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
    "0 (none), 1 (coarse) or 2 (fine), optionally followed by npuN:FIRST-LAST for the cores of card N, force:0/1, "
    "npu_affine:0/1, bind_irq:0/1, lazy_bind:0/1, separated by commas, such as 1,npu0:0-1,npu1:2-5",
    _is_affinity,
)
CARDS = Form("card numbers in ascending order, separated by commas without spaces, such as 0,1,2,3", _is_card_list)
PORT_RANGES = Form(
    "auto, or ports and ranges of ports from 1 to 65535 that do not overlap, separated by commas, such as "
    "61000,61050-61100",
    _is_port_ranges,
)
TRUTH = Form("false or true, in any case, or no, off, 0, yes, on, 1", _is_tokenizers_truth)


# The tables


@dataclass(frozen=True)
class Variable:
    """An environment variable of the ranks.

    legal: valid values, for all product lines that `on` does not name, and for unknown ones.
    default: the value for ranks if it is unset; None for no default.
    sharded: the same for ranks that shard weights by FSDP2; None: as for other ranks.
    unless: another variable that disables the default if it is set.
    remarks: value -> a remark for the log.
    on: product line (see `host.npu_line`) -> valid values there.
    """

    name: str
    legal: Legal
    meaning: str
    source: str
    default: str | None = None
    sharded: str | None = None
    unless: str | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)
    on: Mapping[str, Legal] = field(default_factory=dict)

    def legal_on(self, line: str | None) -> Legal:
        """The valid values on a product line; None is an unknown line."""
        return self.on.get(line, self.legal)


# On a CPU, freed memory is kept for the next tensors of a job. Otherwise glibc maps each large tensor again and the
# kernel clears its pages, which took a third of a VAE's time. `devices.empty_cache` returns it to the kernel.
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

_EXPANSIONS = {
    "a2": ("HOST", "HOST_TS", "AI_CPU", "AIV"),
    "a3": ("AI_CPU", "AICPU_CacheDisable", "AIV"),
    "a5": ("AI_CPU", "AICPU_TS", "AICPU_CacheDisable", "AIV", "CCU_MS", "CCU_SCHED"),
}

NPU = (
    Variable("PYTORCH_NPU_ALLOC_CONF", ALLOCATOR, "the device memory allocator; expandable_segments fragment less",
             "torch_npu; MindIE", "expandable_segments:True", unless="PYTORCH_ALLOC_CONF"),
    Variable("PYTORCH_ALLOC_CONF", ALLOCATOR, "the same by torch's name; only one of both may be set", "torch_npu"),
    Variable("TASK_QUEUE_ENABLE", OneOf(("0", "1", "2")), "the level of the operator launch queue",
             "torch_npu; MindIE", "2"),
    Variable("CPU_AFFINITY_CONF", AFFINITY, "binding of a rank's threads to cores", "torch_npu; MindIE", "1"),
    Variable("TOKENIZERS_PARALLELISM", TRUTH, "whether tokenizers start threads", "tokenizers; MindIE", "false"),
    # Ranks connect when a group is made, which all come to together, and pairs of them at their first exchange. Ten
    # minutes, as torch_npu's page of P2P_HCCL_BUFFSIZE advises where one may be late; HCCL's default is 120 s.
    Variable("HCCL_CONNECT_TIMEOUT", WholeNumber(120, 7200), "seconds that ranks wait for each other to connect",
             "CANN", "600"),
    # Limits by product line: CANN's page of this variable (envref_07_0078); CANN 6.0 had 68 to 17340 for all cards. For
    # AIV collectives, HCCL reduces values above 1091 s to 1091.
    Variable("HCCL_EXEC_TIMEOUT", Seconds(LONGEST_WAIT), "seconds that a rank waits in a collective; 0: no limit",
             "CANN", "1800", on={"a5": WholeNumber(0, LONGEST_WAIT)}),
    # HCCL's documented cure for error code 7 of HcclGetRootInfo, a port in use, as with two processes on one card.
    Variable("HCCL_HOST_SOCKET_PORT_RANGE", PORT_RANGES, "host ports for the ranks' rendezvous", "CANN",
             "auto", unless="HCCL_IF_BASE_PORT"),
    Variable("HCCL_NPU_SOCKET_PORT_RANGE", PORT_RANGES, "ports of the cards' network", "CANN", "auto"),
    Variable("HCCL_IF_BASE_PORT", WholeNumber(1024, 65520), "first of 32 host ports, of 16 in older CANN (HCCL's "
             "default: 60000)", "CANN"),
    # What each word means, and which card has it: HCCL's page of this variable. On an A2 and A3, HCCL takes its default
    # for another card's word; a 950 refuses it.
    Variable("HCCL_OP_EXPANSION_MODE", OneOf(tuple(dict.fromkeys(sum(_EXPANSIONS.values(), ())))),
             "what unfolds a collective: the host (HOST, HOST_TS), a card's AI CPU (AI_CPU, AICPU_TS, without a cache "
             "AICPU_CacheDisable), its vector cores (AIV) or its communication unit (CCU_MS, CCU_SCHED)", "CANN",
             remarks={"AIV": "HCCL supports AIV for one communicator at a time, so for a plan with one axis, without "
                             "fsdp, and waits at most 1091 s in a collective"},
             on={line: OneOf(words) for line, words in _EXPANSIONS.items()}),
    Variable("HCCL_BUFFSIZE", WholeNumber(1), "MB of each of the two buffers of a communicator (HCCL's default: 200)",
             "torch_npu; CANN"),
    Variable("P2P_HCCL_BUFFSIZE", WholeNumber(0), "the same for point-to-point communication", "torch_npu"),
    Variable("ASCEND_RT_VISIBLE_DEVICES", CARDS, "the visible cards", "torch_npu: others are dropped; CANN"),
    Variable("ASCEND_LAUNCH_BLOCKING", FLAG, "synchronous operator launches, for debugging", "torch_npu",
             remarks={"1": "operators are launched synchronously, which overrides TASK_QUEUE_ENABLE and is slow"}),
    Variable("MINDIE_SD_FA_TYPE", OneOf(("prompt_flash_attn", "fused_attn_score", "ascend_laser_attention")),
             "MindIE SD's operator for attention laser", "mindiesd",
             remarks=dict.fromkeys(("prompt_flash_attn", "fused_attn_score"), "attention laser uses this operator")),
    Variable("ASCEND_SLOG_PRINT_TO_STDOUT", FLAG, "CANN's log on the screen", "CANN"),
    Variable("ASCEND_GLOBAL_LOG_LEVEL", WholeNumber(0, 4), "CANN's log: 0 debug, 1 info, 2 warning, 3 error, 4 none",
             "CANN"),
    Variable("COMBINED_ENABLE", FLAG, "merges pairs of operators on memory that is not contiguous", "torch_npu"),
    Variable("ACLNN_CACHE_LIMIT", WholeNumber(1, 10_000_000), "the number of cached operators", "CANN"),
    # FSDP2 gathers weights on another stream. With 1, a collective marks the memory that it uses for its stream, and
    # wait() erases the mark; with 2, it holds references instead. vLLM-Omni's recipe of Wan2.2-I2V requires 2 for such
    # ranks on NPUs, as marks let memory grow there (pytorch/pytorch#147168). torch_npu's page of the variable does not
    # recommend 2, as it may keep tensors for longer, and has 1 as the default.
    Variable("MULTI_STREAM_MEMORY_REUSE", OneOf(("0", "1", "2", "3")), "memory shared by streams", "torch_npu",
             sharded="2"),
    Variable("NPU_ASD_ENABLE", OneOf(("0", "1", "2", "3")), "detection of suspicious values", "torch_npu"),
    Variable("INF_NAN_MODE_ENABLE", FLAG, "1: overflow is inf, 0: the largest number (old cards)", "torch_npu"),
    Variable("INF_NAN_MODE_FORCE_DISABLE", FLAG, "1 forces INF_NAN_MODE_ENABLE=0 on newer cards", "torch_npu"),
)  # fmt: skip

_BY_NODES = dict.fromkeys(
    "01", "has no effect; caches are set for each job, as by the node Ascend Block Cache, for both branches"
)

# The original systems' variables. On NPUs, they set defaults of OperatorSpec, ParallelSpec and TextEncoderSpec, or have
# no effect. Other software uses these common names too, so they are ignored on a CPU and CUDA.
ORIGINAL_VARIABLES = (
    Variable("ALGO", OneOf(("0", "1", "3")), "attention: 0 fused, 1 laser, 3 infer", "MindIE"),
    Variable("FAST_LAYERNORM", FLAG, "layer norm: 0 upcast to fp32, 1 fused", "MindIE"),
    Variable("USE_SUB_HEAD", WholeNumber(0, 1024), "heads per attention call; 0: all", "MindIE"),
    Variable("PRECISION", FLAG, "1: noise drawn on the CPU", "MindIE",
             remarks={"0": "has no effect; noise is always drawn on the CPU, so that a seed gives the same video on "
                           "every device"}),
    Variable("T5_LOAD_CPU", FLAG, "the text encoder: 1 on one rank's CPU, 0 on the devices of all ranks", "MindIE"),
    Variable("OVERLAP", FLAG, "1: Ulysses' exchange overlaps with attention", "MindIE"),
    Variable("ROPE_OPT", FLAG, "fused rotary embedding", "MindIE",
             remarks={"0": "has no effect; the rotary embedding is always fused. ASCEND_RUNTIME_OPERATORS=torch "
                           "computes it, and all else, by torch's own operators",
                      "1": "has no effect; the rotary embedding is always fused"}),
    Variable("ADA_LAYERNORM", FLAG, "layer norm fused with its modulation", "MindIE",
             remarks={"0": "has no effect; a fused layer norm takes its modulation as weight and bias. "
                           "FAST_LAYERNORM=0 computes both apart, in float32",
                      "1": "has no effect; layer norm and modulation are fused, unless FAST_LAYERNORM is 0"}),
    Variable("QUANT_ALLTOALL", FLAG, "int8 exchange of Ulysses", "MindIE",
             remarks={"0": "has no effect; Ulysses never quantizes its exchange",
                      "1": "has no effect; Ulysses does not quantize its exchange, since that would change the video. "
                           "OVERLAP=1 lets it run while attention computes"}),
    Variable("COND_CACHE", FLAG, "DiTCache in cond passes", "MindIE SD: examples/cache", remarks=_BY_NODES),
    Variable("UNCOND_CACHE", FLAG, "DiTCache in uncond passes", "MindIE SD: examples/cache", remarks=_BY_NODES),
    Variable("CUDA_DEVICE_MAX_CONNECTIONS", WholeNumber(1, 32), "hardware queues of a CUDA device", "MindSpeed-MM",
             remarks=dict.fromkeys(map(str, range(1, 33)), "has no effect on NPUs; only Megatron checks it")),
)  # fmt: skip

START_DEADLINE = "ASCEND_RUNTIME_START_DEADLINE"
# An empty value of one of these counts as unset.
OPTIONAL = {
    *HEAP, *(row.name for row in (*NPU, *ORIGINAL_VARIABLES)), START_DEADLINE, cores.THREADS_VARIABLE, "OMP_WAIT_POLICY"
}  # fmt: skip

_ATTENTION_OF = {"0": "fused", "1": "laser", "3": "infer"}
_LAYER_NORM_OF = {"0": "fp32", "1": "fused"}


# The environment of ranks


def original(kind: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The original systems' variables that are set, on NPUs; empty on other kinds of devices."""
    rows = ORIGINAL_VARIABLES if kind == "npu" else ()
    return {row.name: environ[row.name] for row in rows if environ.get(row.name)}


def with_defaults(spec: OperatorSpec, environ: Mapping[str, str]) -> OperatorSpec:
    """`spec` with automatic fields (auto, 0) resolved: by ALGO, FAST_LAYERNORM and USE_SUB_HEAD, else all heads at once
    and fused layer norm. Without ALGO, attention stays auto, which depends on the card and the dtype.

    environ: from `original`, here and below.

    Raises ValueError if a variable of the original systems has an invalid value.
    """
    _raise(_wrong(ORIGINAL_VARIABLES, environ, {}))
    attention, layer_norm = spec.attention, spec.layer_norm
    return replace(
        spec,
        attention=_ATTENTION_OF.get(environ.get("ALGO"), "auto") if attention == "auto" else attention,
        layer_norm=_LAYER_NORM_OF[environ.get("FAST_LAYERNORM", "1")] if layer_norm == "auto" else layer_norm,
        heads_per_call=spec.heads_per_call or int(environ.get("USE_SUB_HEAD", "0")),
    )


def overlaps(spec: ParallelSpec, environ: Mapping[str, str]) -> bool:
    """Whether Ulysses' exchange overlaps with attention: set by `spec`, else by OVERLAP, else False.

    Raises ValueError if OVERLAP is neither 0 nor 1.
    """
    _raise(_wrong(ORIGINAL_VARIABLES, environ, {}))
    return environ.get("OVERLAP", "0") == "1" if spec.overlap is None else spec.overlap


def placed(spec: TextEncoderSpec, environ: Mapping[str, str]) -> TextEncoderSpec:
    """`spec` with placement "auto" resolved: by T5_LOAD_CPU, else cpu, which is where ranks begin.

    Raises ValueError if T5_LOAD_CPU is neither 0 nor 1.
    """
    _raise(_wrong(ORIGINAL_VARIABLES, environ, {}))
    default = "cpu" if environ.get("T5_LOAD_CPU", "1") == "1" else "ranks"
    return replace(spec, placement=default if spec.placement == "auto" else spec.placement)


def rank_environment(
    kind: str, environ: Mapping[str, str], own: Mapping[str, str], sharded: bool = False
) -> dict[str, str]:
    """The environment variables of a group's ranks, without those that differ between ranks.

    own: the `environment` of this runtime. It overrides `environ`, the user's, which overrides the defaults.
    sharded: whether the ranks shard weights by FSDP2.
    On a CPU and CUDA, the variables for NPUs and of the original systems are ignored.

    Raises ValueError that lists every variable with an invalid value, the valid values, and where it was set.
    """
    given = {name: value for name, value in {**environ, **own}.items() if value or name not in OPTIONAL}
    if kind == "npu":
        return _on_npus(given, own, host.npu_line(), sharded)
    if unused := [f"{row.name}={given[row.name]}" for row in ORIGINAL_VARIABLES if row.name in given]:
        logger.debug("variables that have an effect only on NPUs, not on %s: %s", kind, ", ".join(unused))
    return given


def suits_sharded(kind: str, environment: Mapping[str, str]) -> bool:
    """Whether ranks with this environment can shard weights by FSDP2, or need another one."""
    return kind != "npu" or all(row.name in environment for row in NPU if row.sharded is not None)


def _on_npus(given: dict[str, str], own: Mapping[str, str], line: str | None, sharded: bool) -> dict[str, str]:
    """The environment on NPUs of a product line: `given`, checked, with defaults added."""
    _raise(npu_variable_faults(given, own, line))
    rows = [row for row in NPU if row.unless not in given]
    defaults = {row.name: (sharded and row.sharded) or row.default for row in rows}
    chosen = {**{name: value for name, value in defaults.items() if value is not None}, **given}
    origins = [(row.name, "default" if row.name not in given else "given") for row in NPU if row.name in chosen]
    logger.info("ranks on npu: %s", ", ".join(f"{name}={chosen[name]} ({origin})" for name, origin in origins))
    for row in (*NPU, *ORIGINAL_VARIABLES):
        if remark := row.remarks.get(given.get(row.name, "")):
            logger.info("%s=%s: %s.", row.name, given[row.name], remark)
    if sharded:
        logger.info(_OF_FSDP, chosen["MULTI_STREAM_MEMORY_REUSE"])
    return chosen


_OF_FSDP = (
    "MULTI_STREAM_MEMORY_REUSE=%s: weights are sharded by FSDP2. For that, vLLM-Omni's recipe of Wan2.2-I2V requires 2 "
    "(pytorch/pytorch#147168), the default here; torch_npu's documentation does not recommend 2, and has 1 as its "
    "default. `python -m benchmarks ascend` measures 1, 2 and 3; set the variable to choose."
)


def start_deadline(environ: Mapping[str, str], default: int = 300) -> float:
    """The seconds until all ranks must be ready: ASCEND_RUNTIME_START_DEADLINE, else the default.

    Raises ValueError if it is not a positive number.
    """
    seconds = environ.get(START_DEADLINE, "").strip() or str(default)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", seconds) or float(seconds) == 0:
        raise ValueError(coded(
            "AV-1103",
            f"{START_DEADLINE} is {seconds!r}; it can be the number of seconds until all ranks must be ready, such as "
            f"600. Unset it for {default}.",
        ))  # fmt: skip
    return float(seconds)


def npu_variable_faults(
    given: Mapping[str, str], own: Mapping[str, str], line: str | None
) -> list[host.HostFault]:
    """What is wrong with the variables of ranks on NPUs of a product line. own: the variables that the runtime sets."""
    wrong = _wrong((*NPU, *ORIGINAL_VARIABLES), given, own, line)
    if {"PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} <= given.keys():
        both = "PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set, but torch_npu uses only one."
        wrong.append(host.HostFault("AV-1103", both, "Unset one of them."))
    return wrong


def _wrong(
    table: tuple[Variable, ...], given: Mapping[str, str], own: Mapping[str, str], line: str | None = None
) -> list[host.HostFault]:
    """What is wrong with each variable of the table whose value is invalid on this product line."""
    return [
        host.HostFault(
            "AV-1103",
            f"{row.name} is {given[row.name]!r}; it can be {row.legal_on(line)} ({row.meaning}).",
            "Change it in the runtime's environment (`Runtime(environment=...)`)." if row.name in own else
            f"In the shell that starts this process, `export {row.name}=VALUE` or `unset {row.name}`.",
        )
        for row in table
        if given.get(row.name) and not row.legal_on(line).admits(given[row.name])
    ]  # fmt: skip


def _raise(wrong: list[host.HostFault]) -> None:
    if wrong:
        raise ValueError("\n".join(map(str, wrong)))
