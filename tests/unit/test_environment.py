"""The ranks' variables: what an NPU's ranks get and from whom, what is refused, what the original systems' mean."""

import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
from ascend_runtime import Result, Runtime
from ascend_runtime.hardware import devices, environment, host
from ascend_runtime.hardware.environment import HEAP, NPU, ORIGINAL_VARIABLES, Form, OneOf, Seconds, WholeNumber
from ascend_runtime.hardware.environment import rank_environment, with_defaults
from ascend_runtime.client.group import RankGroup
from ascend_runtime.client.restarts import PIDS_VARIABLE
from ascend_runtime.specs import DiffusionModelSpec, OperatorSpec, ParallelSpec, TextEncoderSpec
from ascend_runtime.wire.messages import Choose
from ascend_runtime.wire.plans import Chosen
from rank_processes import environment_of

ROOT = Path(__file__).resolve().parents[2]
BAD_FORMS = {  # what the tables cannot say by themselves: values that break a rule of a form, each another
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments", "expandable_segments:yes", "segments:True",
                               "expandable_segments:True,max_split_size_mb:128", "base_addr_aligned_kb:17",
                               "per_process_memory_fraction:1.5"),
    "PYTORCH_ALLOC_CONF": ("max_split_size_mb:many",),
    "CPU_AFFINITY_CONF": ("3", "on", "1,npu0", "1,npu0:5-1", "1,force:2", "npu0:0-1", "1,npu١:0-1"),
    "ASCEND_RT_VISIBLE_DEVICES": ("0, 1", "1,0", "0,0", "-1", "0,1,", "npu0", "١"),
    "HCCL_HOST_SOCKET_PORT_RANGE": ("automatic", "0", "65536", "60000-65536", "61000-60000", "60000-60015,",
                                    "60000-60015;61000-61015", "60000-60015,60010-60020", "60000,60000"),
    "HCCL_NPU_SOCKET_PORT_RANGE": ("auto,16666", "0-1"),
    "TOKENIZERS_PARALLELISM": ("maybe", "2", " true"),
}  # fmt: skip
GOOD_FORMS = {
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments:False,max_split_size_mb:128", "page_size:1g",
                               "roundup_power2_divisions:[256:1,512:2,>:4],garbage_collection_threshold:0.6"),
    "PYTORCH_ALLOC_CONF": ("expandable_segments:True",),
    "CPU_AFFINITY_CONF": ("0", "2", "1,npu0:0-1,npu1:2-5", "1,force:1", "2,npu_affine:1,bind_irq:0"),
    "ASCEND_RT_VISIBLE_DEVICES": ("0", "0,1,2,3", "4,5,6,7", "0,15"),
    "HCCL_HOST_SOCKET_PORT_RANGE": ("auto", "1024-65535", "60000-60015,61000-61015", "60000-60000", "60000",
                                    "60000,60050-60100,60150-60160", "56000,56005,56007,56008"),
    "HCCL_NPU_SOCKET_PORT_RANGE": ("auto", "16666-16700", "61000,61050-61100"),
    "TOKENIZERS_PARALLELISM": ("false", "true", "0", "1", "False", "True", "no", "off"),
}  # fmt: skip
OURS = {
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "TASK_QUEUE_ENABLE": "2", "CPU_AFFINITY_CONF": "1",
    "TOKENIZERS_PARALLELISM": "false", "HCCL_CONNECT_TIMEOUT": "600", "HCCL_EXEC_TIMEOUT": "1800",
    "HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto",
}  # fmt: skip
PORT_RANGES = {"HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE"}
LOOPBACK = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}


def bad_values(row):
    match row.legal:
        case WholeNumber(low, high):
            return [str(low - 1), str(high + 1), f"{low}.5", f" {low}", "many"]
        case Seconds(high):
            return ["-1", str(high + 1), "0.005", "1.", ".5", "1e3", "never", "inf", "١"]
        case OneOf(values):
            return ["yes please", "-1", " " + values[0], *(str(n) for n in range(9) if str(n) not in values)]
        case Form():
            return BAD_FORMS[row.name]


def good_values(row):
    match row.legal:
        case WholeNumber(low, high):
            return [str(low), str(high)]
        case Seconds(high):
            return ["0", "0.05", "1", "60", "36000", str(high)]
        case OneOf(values):
            return values
        case Form():
            return GOOD_FORMS[row.name]


ROWS = [pytest.param(row, id=row.name) for row in (*NPU, *ORIGINAL_VARIABLES)]
BAD = [
    pytest.param(row, value, id=f"{row.name}={value}")
    for row in (*NPU, *ORIGINAL_VARIABLES)
    for value in bad_values(row)
]


# What is legal


@pytest.mark.parametrize("row, value", BAD)
def test_a_bad_value_is_told_with_what_is_legal_and_where_to_set_it(row, value):
    said = str(pytest.raises(ValueError, rank_environment, "npu", {row.name: value}, {}).value)
    for words in (f"{row.name} is {value!r}", str(row.legal), row.meaning, f"export {row.name}=", f"unset {row.name}"):
        assert words in said
    said = str(pytest.raises(ValueError, rank_environment, "npu", {}, {row.name: value}).value)
    assert f"{row.name} is {value!r}" in said and "Runtime(environment=...)" in said and "export" not in said


@pytest.mark.parametrize("row", ROWS)
def test_good_values_reach_the_ranks_as_they_are(row):
    for value in good_values(row):
        assert rank_environment("npu", {row.name: value}, {})[row.name] == value


@pytest.mark.parametrize("name, low, high", [
    ("HCCL_CONNECT_TIMEOUT", 120, 7200), ("HCCL_IF_BASE_PORT", 1024, 65520), ("ACLNN_CACHE_LIMIT", 1, 10_000_000),
])  # fmt: skip
def test_documented_ranges(name, low, high):
    """The tests above take their bounds from the table; these are the documents'."""
    legal = {row.name: row.legal for row in NPU}[name]
    assert (legal.low, legal.high) == (low, high)


# By card, as CANN's page of HCCL_EXEC_TIMEOUT has it; None: which one it is, is not known.
WAITS = {
    "a2": (["0", "0.05", "60", "1800", "36000", "2147483647"], ["2147483648", "-1", "0.005"]),
    "a3": (["0", "0.05", "60", "1800", "36000", "2147483647"], ["2147483648", "-1", "0.005"]),
    "a5": (["0", "60", "36000", "2147483647"], ["0.05", "2147483648"]),
    None: (["0", "0.05", "60", "36000", "2147483647"], ["2147483648"]),
}  # fmt: skip


@pytest.mark.parametrize("line", WAITS)
def test_how_long_a_rank_may_wait_depends_on_its_card(line, monkeypatch):
    monkeypatch.setattr(host, "npu_line", lambda: line)
    good, bad = WAITS[line]
    for value in good:
        assert rank_environment("npu", {"HCCL_EXEC_TIMEOUT": value}, {})["HCCL_EXEC_TIMEOUT"] == value
    for value in bad:
        with pytest.raises(ValueError, match=f"HCCL_EXEC_TIMEOUT is '{value}'; it can be a "):
            rank_environment("npu", {"HCCL_EXEC_TIMEOUT": value}, {})


# By card, as HCCL's page of HCCL_OP_EXPANSION_MODE has it.
EXPANSIONS = {
    "a2": {"HOST", "HOST_TS", "AI_CPU", "AIV"},
    "a3": {"AI_CPU", "AICPU_CacheDisable", "AIV"},
    "a5": {"AI_CPU", "AICPU_TS", "AICPU_CacheDisable", "AIV", "CCU_MS", "CCU_SCHED"},
}


@pytest.mark.parametrize("line", [*EXPANSIONS, None])
def test_what_unfolds_collectives_depends_on_the_card(line, monkeypatch, caplog):
    """Without a default; AIV, which has limits, is remarked on."""
    monkeypatch.setattr(host, "npu_line", lambda: line)
    every = set.union(*EXPANSIONS.values())
    name, legal = "HCCL_OP_EXPANSION_MODE", EXPANSIONS.get(line, every)
    for value in legal:
        assert rank_environment("npu", {name: value}, {})[name] == value
    for value in (every | {"CCU", "aiv"}) - legal:
        with pytest.raises(ValueError, match=f"{name} is '{value}'; it can be one of "):
            rank_environment("npu", {name: value}, {})
    assert name not in rank_environment("npu", {}, {})
    with caplog.at_level(logging.INFO):
        rank_environment("npu", {name: "AIV"}, {})
    assert "one communicator at a time" in caplog.text


@pytest.mark.parametrize("row", [*NPU, *ORIGINAL_VARIABLES], ids=lambda row: row.name)
def test_an_empty_variable_counts_as_unset(row):
    unset = rank_environment("npu", {}, {})
    assert rank_environment("npu", {row.name: ""}, {}) == rank_environment("npu", {}, {row.name: ""}) == unset
    value = good_values(row)[0]
    assert rank_environment("npu", {row.name: value}, {row.name: ""}) == unset, "the runtime's empty one unsets it"


def test_all_bad_values_come_in_one_error():
    environ = {"HCCL_CONNECT_TIMEOUT": "60", "ALGO": "2", "TASK_QUEUE_ENABLE": "2"}
    said = str(pytest.raises(ValueError, rank_environment, "npu", environ, {"NPU_ASD_ENABLE": "4"}).value)
    assert [line.split()[1] for line in said.splitlines()] == ["HCCL_CONNECT_TIMEOUT", "NPU_ASD_ENABLE", "ALGO"]


def test_both_names_of_the_allocator():
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}
    with pytest.raises(ValueError, match="PYTORCH_NPU_ALLOC_CONF and PYTORCH_ALLOC_CONF are both set"):
        rank_environment("npu", environ, {})


# Who decides


def test_ours_where_nobody_asks_for_anything():
    assert rank_environment("npu", {}, {}) == OURS


def test_the_runtime_goes_before_the_user_and_the_user_before_us():
    environ = {"TASK_QUEUE_ENABLE": "1", "HCCL_EXEC_TIMEOUT": "600", "HOME": "/root", "ASCEND_GLOBAL_LOG_LEVEL": "3"}
    own = {"HCCL_EXEC_TIMEOUT": "900", "ASCEND_RT_VISIBLE_DEVICES": "2,3"}
    assert rank_environment("npu", environ, own) == {**OURS, **environ, **own}


@pytest.mark.parametrize("name, value, ours", [
    ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64", "PYTORCH_NPU_ALLOC_CONF"),  # torch_npu takes one of them
    ("HCCL_IF_BASE_PORT", "50000", "HCCL_HOST_SOCKET_PORT_RANGE"),  # which would override it
])  # fmt: skip
def test_a_default_does_not_overrule_what_the_user_says_by_another_name(name, value, ours):
    chosen = rank_environment("npu", {name: value}, {})
    assert ours not in chosen and chosen[name] == value


def test_a_bad_value_that_the_runtime_overrules_is_none():
    assert rank_environment("npu", {"ALGO": "7"}, {"ALGO": "1"})["ALGO"] == "1"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_elsewhere_the_npus_variables_are_neither_set_nor_looked_at(kind):
    environ = {row.name: "nonsense" for row in NPU}
    assert rank_environment(kind, {}, {}) == {}
    assert rank_environment(kind, environ, {}) == environ


# What other software means by these names, and what an NPU would heed.
OTHERS = dict(zip([row.name for row in ORIGINAL_VARIABLES],
                  ["ring", "yes", "all", "fp16", "on", "true", "x", "y", "z", "cond", "no", "0"], strict=True))
NPUS = {"ALGO": "3", "FAST_LAYERNORM": "0", "USE_SUB_HEAD": "4", "T5_LOAD_CPU": "0", "OVERLAP": "1"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("environ", [OTHERS, NPUS], ids=["other software's", "an NPU's"])
def test_elsewhere_the_original_systems_variables_change_nothing(kind, environ, caplog):
    with caplog.at_level(logging.DEBUG):
        assert rank_environment(kind, environ, {}) == environ and environment.original(kind, environ) == {}
    (line,) = lines_of(caplog)
    assert f"on {kind}" in line and all(f"{name}={value}" in line for name, value in environ.items())
    assert caplog.records[-1].levelno == logging.DEBUG


def test_on_an_npu_they_count():
    assert environment.original("npu", {**NPUS, "PRECISION": "", "HOME": "/root"}) == NPUS
    said = str(pytest.raises(ValueError, rank_environment, "npu", OTHERS, {}).value)
    assert [line.split()[:2] for line in said.splitlines()] == [["AV-1103:", name] for name in OTHERS]


def test_a_runtime_says_it_before_it_starts_a_rank():
    with Runtime(device="cpu", environment={"ASCEND_RUNTIME_START_DEADLINE": "soon"}) as runtime:
        with pytest.raises(ValueError, match="ASCEND_RUNTIME_START_DEADLINE is 'soon'; it can be the number of sec"):
            runtime.ping()
        assert runtime.pids == []


# When ranks must be ready


@pytest.mark.parametrize("asked, seconds", [(None, 300), ("", 300), (" ", 300), ("600", 600), ("0.5", 0.5)])
def test_the_deadline_of_the_start(asked, seconds):
    assert environment.start_deadline({} if asked is None else {environment.START_DEADLINE: asked}) == seconds


@pytest.mark.parametrize("asked", ["soon", "0", "-1", "1e3", "inf", "nan", "5 min"])
def test_a_deadline_that_is_no_number(asked):
    with pytest.raises(ValueError, match=f"ASCEND_RUNTIME_START_DEADLINE is '{asked}'"):
        environment.start_deadline({environment.START_DEADLINE: asked})


def test_any_value_lets_the_pack_be_imported():
    """A node that is not there says nothing; ranks that are to start do."""
    names = ["ASCEND_RUNTIME_START_DEADLINE", "ASCEND_RUNTIME_OPERATORS", "OMP_NUM_THREADS",
             *(row.name for row in (*NPU, *ORIGINAL_VARIABLES))]  # fmt: skip
    code = """
        import os, sys
        for value in ("nonsense", ""):
            os.environ.update(dict.fromkeys(sys.argv[1:], value))
            import ascend_runtime.client.group, ascend_runtime.ops
            for name in [name for name in sys.modules if name.startswith("ascend_runtime")]:
                del sys.modules[name]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *names], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


# What is said of it


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ascend_runtime.hardware.environment"]


def test_the_choice_is_logged_in_one_line_a_group(caplog, monkeypatch):
    for row in (*NPU, *ORIGINAL_VARIABLES):
        monkeypatch.delenv(row.name, raising=False)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    before = dict(os.environ)
    with caplog.at_level(logging.INFO):
        RankGroup(2, "npu")  # not started
    (line,) = lines_of(caplog)
    assert "TASK_QUEUE_ENABLE=1 (given)" in line and "CPU_AFFINITY_CONF=1 (default)" in line
    assert set(re.findall(r"(\w+)=\S+ \(", line)) == set(OURS)
    assert dict(os.environ) == before


# What each value of an original system's variable changes here, as the ranks read it; a text is why it changes nothing.
HEADS = {str(number): {"heads_per_call": number} for number in (0, 1, 4, 1024)}
EFFECTS = {
    "ALGO": {"0": {"attention": "fused"}, "1": {"attention": "laser"}, "3": {"attention": "infer"}},
    "FAST_LAYERNORM": {"0": {"layer_norm": "fp32"}, "1": {"layer_norm": "fused"}},
    "USE_SUB_HEAD": HEADS,
    "PRECISION": {"0": "noise is always drawn on the CPU", "1": {}},
    "T5_LOAD_CPU": {"0": {"placement": "ranks"}, "1": {"placement": "cpu"}},
    "OVERLAP": {"0": {"overlap": False}, "1": {"overlap": True}},
    "ROPE_OPT": {"0": "always fused. ASCEND_RUNTIME_OPERATORS=torch", "1": "always fused"},
    "ADA_LAYERNORM": {"0": "FAST_LAYERNORM=0 computes both apart", "1": "are fused, unless FAST_LAYERNORM is 0"},
    "QUANT_ALLTOALL": {"0": "never quantizes", "1": "that would change the video. OVERLAP=1 lets it run"},
    "COND_CACHE": dict.fromkeys("01", "caches are set for each job, as by the node Ascend Block Cache"),
    "UNCOND_CACHE": dict.fromkeys("01", "caches are set for each job, as by the node Ascend Block Cache"),
    "CUDA_DEVICE_MAX_CONNECTIONS": dict.fromkeys(("1", "8", "32"), "only Megatron checks it"),
}  # fmt: skip


def test_all_original_variables_are_looked_at():
    assert list(EFFECTS) == [row.name for row in ORIGINAL_VARIABLES]
    for row in ORIGINAL_VARIABLES:
        assert set(good_values(row)) <= EFFECTS[row.name].keys()


@pytest.mark.parametrize("name, value", [(name, value) for name, values in EFFECTS.items() for value in values])
def test_an_original_variable_has_its_effect_or_a_line_says_why_not(name, value, caplog):
    expected = EFFECTS[name][value]
    with caplog.at_level(logging.INFO):
        rank_environment("npu", {name: value}, {})
    _, *remarks = lines_of(caplog)  # the first is of all variables
    if isinstance(expected, str):
        (remark,) = remarks
        assert remark.startswith(f"{name}={value}: has no effect") and expected in remark
        return
    given = environment.original("npu", {name: value})
    operators, text = with_defaults(OperatorSpec(), given), environment.placed(TextEncoderSpec(path="/a"), given)
    found = {"overlap": environment.overlaps(ParallelSpec(), given), "placement": text.placement,
             "attention": operators.attention, "layer_norm": operators.layer_norm,
             "heads_per_call": operators.heads_per_call}  # fmt: skip
    assert found.items() >= expected.items()


def test_nothing_is_logged_of_variables_that_nobody_set(caplog):
    with caplog.at_level(logging.INFO):
        rank_environment("npu", {}, {})
    assert len(lines_of(caplog)) == 1, "the line of all variables"


# Weights that FSDP2 shards

REUSE = "MULTI_STREAM_MEMORY_REUSE"


@pytest.mark.parametrize("given, chosen", [({}, "2"), ({REUSE: "1"}, "1"), ({REUSE: "3"}, "3"), ({REUSE: ""}, "2")])
def test_ranks_that_shard_weights_get_2_with_both_sources_unless_the_user_chooses(given, chosen, caplog):
    with caplog.at_level(logging.INFO):
        ranks = rank_environment("npu", given, {}, sharded=True)
    assert ranks == {**OURS, REUSE: chosen} and environment.suits_sharded("npu", ranks)
    *_, line = lines_of(caplog)
    assert line.startswith(f"{REUSE}={chosen}: ")
    for words in ("vLLM-Omni", "requires 2", "pytorch/pytorch#147168", "torch_npu's documentation", "not recommend"):
        assert words in line


def test_other_ranks_get_torch_npus_own_default(caplog):
    with caplog.at_level(logging.INFO):
        ranks = rank_environment("npu", {}, {})
    assert REUSE not in ranks and not environment.suits_sharded("npu", ranks)
    assert not any(REUSE in line for line in lines_of(caplog))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_elsewhere_sharded_weights_need_no_variable(kind):
    assert rank_environment(kind, {}, {}, sharded=True) == {} and environment.suits_sharded(kind, {})


SHARDED, WHOLE = ParallelSpec(ranks=2, fsdp=True), ParallelSpec(ranks=2)


def answered(runtime, message, hooks):
    """Fake ranks choose what was asked for, and whole weights where that is left open."""
    plan = Chosen(parallel=message.planned.parallel) if isinstance(message, Choose) else None
    return Result(info={"plan": plan and msgspec.to_builtins(plan)})


@pytest.mark.parametrize("first, own, then, started", [
    (WHOLE, {}, WHOLE, [False]), (SHARDED, {}, SHARDED, [True]), (WHOLE, {}, SHARDED, [False, True]),
    (SHARDED, {}, WHOLE, [True]), (WHOLE, {REUSE: "1"}, SHARDED, [False]),
])  # fmt: skip
def test_a_group_starts_again_for_the_first_job_that_shards_weights(first, own, then, started, monkeypatch):
    """Groups of fake ranks on fake NPUs: which ones are started for two jobs."""
    groups = []

    class Group(RankGroup):
        def __init__(self, world_size, kind, environment, sharded):
            super().__init__(world_size, kind, environment, sharded)
            groups.append((self, sharded))

        alive = property(lambda self: not self._stopping)
        start = lambda self, check, on_notice: None  # noqa: E731
        stop = lambda self: setattr(self, "_stopping", True)  # noqa: E731

    monkeypatch.setattr("ascend_runtime.client.kept_ranks.RankGroup", Group)
    monkeypatch.setattr(devices, "resolve_kind", lambda kind: kind)
    monkeypatch.setattr(devices, "resolve_ranks", lambda ranks, *_: ranks)
    monkeypatch.setattr(Runtime, "_submit", answered)
    monkeypatch.delenv(REUSE, raising=False)
    with Runtime(first, device="npu", environment=own) as runtime:
        for parallel in (first, then):
            runtime.load(model=DiffusionModelSpec(path="/a"), parallel=parallel)
    assert [sharded for _, sharded in groups] == started


@pytest.mark.parametrize("placement, sharded", [("ranks", True), ("cpu", False), ("auto", True)])
def test_a_text_encoder_on_all_ranks_is_sharded_too(placement, sharded, monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "resolve_kind", lambda kind: kind)
    monkeypatch.setattr(devices, "resolve_ranks", lambda ranks, *_: ranks)
    monkeypatch.setattr(Runtime, "_start", lambda self, hooks, sharded: asked.append(sharded))
    monkeypatch.setattr(Runtime, "_submit", lambda *_: None)
    runtime = Runtime(WHOLE, device="npu", environment={"T5_LOAD_CPU": "0"})
    runtime.encode(TextEncoderSpec(path="/a", placement=placement), "a boat")
    runtime.load(encoder=TextEncoderSpec(path="/a", placement=placement))
    assert asked == [sharded, sharded]


# Operators


@pytest.mark.parametrize("environ, resolved", [
    ({}, OperatorSpec(attention="auto", layer_norm="fused")),
    ({"ALGO": "0", "FAST_LAYERNORM": "0"}, OperatorSpec(attention="fused", layer_norm="fp32")),
    ({"ALGO": "1", "FAST_LAYERNORM": "1"}, OperatorSpec(attention="laser", layer_norm="fused")),
    ({"ALGO": "3", "USE_SUB_HEAD": "4"}, OperatorSpec(attention="infer", layer_norm="fused", heads_per_call=4)),
])  # fmt: skip
def test_what_a_graph_leaves_open_the_variables_decide(environ, resolved):
    assert with_defaults(OperatorSpec(), environ) == resolved


def test_what_a_graph_says_goes_before_the_variables():
    spec = OperatorSpec(attention="plain", heads_per_call=2, layer_norm="fused")
    assert with_defaults(spec, {"ALGO": "1", "USE_SUB_HEAD": "5", "FAST_LAYERNORM": "0"}) == spec


def test_operators_from_a_bad_variable():
    with pytest.raises(ValueError, match="USE_SUB_HEAD is 'all'; it can be a whole number from 0 to 1024"):
        with_defaults(OperatorSpec(), {"USE_SUB_HEAD": "all"})


# A real group


def test_real_ranks_on_a_cpu(monkeypatch):
    for row in NPU:
        monkeypatch.delenv(row.name, raising=False)
    monkeypatch.setenv("HCCL_BUFFSIZE", "nonsense")  # a stray one
    monkeypatch.setenv("PRECISION", "fp16")  # another's
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    before = dict(os.environ)
    with Runtime(ParallelSpec(ranks=2), device="cpu", environment={"ASCEND_TEST_OWN": "1"}) as runtime:
        runtime.start()
        for pid in runtime.pids:
            theirs = environment_of(pid)
            set_by_us = {row.name for row in NPU} & theirs.keys()
            assert set_by_us == {"HCCL_BUFFSIZE", "TOKENIZERS_PARALLELISM"} and theirs["ASCEND_TEST_OWN"] == "1"
            changed = {name for name, value in before.items() if theirs.get(name) != value}
            assert theirs["PRECISION"] == "fp16" and theirs["OMP_NUM_THREADS"] == "3"
            assert theirs["OMP_WAIT_POLICY"] == "PASSIVE"
            assert changed <= {"OMP_WAIT_POLICY", "PYTHONSAFEPATH", *HEAP, *LOOPBACK}
    assert {**os.environ, PIDS_VARIABLE: ""} == {**before, PIDS_VARIABLE: ""}


def test_nothing_is_exported_here():
    """Neither by the tables, nor by what reads them."""
    for path in [*(ROOT / "ascend_runtime" / "hardware").glob("*.py"), ROOT / "ascend_runtime" / "client" / "group.py"]:
        code = path.read_text()
        assert not re.search(r"os\.environ\[[^]]*\] *=|putenv|setdefault|environ\.update", code)


@pytest.mark.parametrize("asked, variable, overlaps", [
    (None, None, False), (None, "0", False), (None, "1", True), (True, "0", True), (False, "1", False)
])  # fmt: skip
def test_overlap_is_the_plans_and_else_the_variables(asked, variable, overlaps):
    environ = {} if variable is None else {"OVERLAP": variable}
    assert environment.overlaps(ParallelSpec(overlap=asked), environ) == overlaps


def test_a_wrong_overlap_is_refused():
    with pytest.raises(ValueError, match="OVERLAP is 'yes'; it can be one of 0, 1"):
        environment.overlaps(ParallelSpec(), {"OVERLAP": "yes"})
