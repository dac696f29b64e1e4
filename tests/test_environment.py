"""The ranks' variables: what an NPU's ranks get and from whom, what is refused, what the original systems' mean."""

import logging
import os
import re
from pathlib import Path

import pytest
from ascend_runtime import Runtime, environment
from ascend_runtime.environment import HEAP, NPU, ORIGINAL, Choice, Form, Whole, rank_environment, with_defaults
from ascend_runtime.launcher import RankGroup
from ascend_runtime.specs import OperatorSpec, ParallelSpec
from rank_processes import environment_of

BAD_FORMS = {  # what the tables cannot tell by themselves: values that break a rule of a form, each another
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments", "expandable_segments:yes", "segments:True", "",
                               "expandable_segments:True,max_split_size_mb:128", "base_addr_aligned_kb:17",
                               "per_process_memory_fraction:1.5"),
    "PYTORCH_ALLOC_CONF": ("max_split_size_mb:many",),
    "CPU_AFFINITY_CONF": ("3", "on", "1,npu0", "1,npu0:5-1", "1,force:2", "npu0:0-1", "1,npu١:0-1"),
    "ASCEND_RT_VISIBLE_DEVICES": ("", "0, 1", "1,0", "0,0", "-1", "0,1,", "npu0", "١"),
    "HCCL_HOST_SOCKET_PORT_RANGE": ("", "automatic", "60000", "1023-2000", "60000-65536", "61000-60000",
                                    "60000-60015,", "60000-60015;61000-61015"),
    "HCCL_NPU_SOCKET_PORT_RANGE": ("16666", "0-1"),
}  # fmt: skip
GOOD_FORMS = {
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments:False,max_split_size_mb:128", "page_size:1g",
                               "roundup_power2_divisions:[256:1,512:2,>:4],garbage_collection_threshold:0.6"),
    "PYTORCH_ALLOC_CONF": ("expandable_segments:True",),
    "CPU_AFFINITY_CONF": ("0", "2", "1,npu0:0-1,npu1:2-5", "1,force:1", "2,npu_affine:1,bind_irq:0"),
    "ASCEND_RT_VISIBLE_DEVICES": ("0", "0,1,2,3", "4,5,6,7", "0,15"),
    "HCCL_HOST_SOCKET_PORT_RANGE": ("auto", "1024-65535", "60000-60015,61000-61015", "60000-60000"),
    "HCCL_NPU_SOCKET_PORT_RANGE": ("auto", "16666-16700"),
}  # fmt: skip
OURS = {
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "TASK_QUEUE_ENABLE": "2", "CPU_AFFINITY_CONF": "1",
    "TOKENIZERS_PARALLELISM": "false", "HCCL_CONNECT_TIMEOUT": "1800", "HCCL_EXEC_TIMEOUT": "1800",
    "HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto",
}  # fmt: skip
LOOPBACK = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}


def bad_values(row):
    match row.legal:
        case Whole(low, high):
            return [str(low - 1), str(high + 1), f"{low}.5", f" {low}", "many", ""]
        case Choice(values):
            return ["", "yes please", "-1", " " + values[0], *(str(n) for n in range(9) if str(n) not in values)]
        case Form():
            return BAD_FORMS[row.name]


def good_values(row):
    match row.legal:
        case Whole(low, high):
            return [str(low), str(high)]
        case Choice(values):
            return values
        case Form():
            return GOOD_FORMS[row.name]


ROWS = [pytest.param(row, id=row.name) for row in (*NPU, *ORIGINAL)]
BAD = [pytest.param(row, value, id=f"{row.name}={value}") for row in (*NPU, *ORIGINAL) for value in bad_values(row)]


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
    ("HCCL_CONNECT_TIMEOUT", 120, 7200), ("HCCL_EXEC_TIMEOUT", 68, 17340), ("HCCL_IF_BASE_PORT", 1024, 65520),
    ("ACLNN_CACHE_LIMIT", 1, 10_000_000),
])  # fmt: skip
def test_documented_ranges(name, low, high):
    """The tests above take their bounds from the table; these are the documents'."""
    legal = {row.name: row.legal for row in NPU}[name]
    assert (legal.low, legal.high) == (low, high)


def test_all_bad_values_come_in_one_error():
    environ = {"HCCL_CONNECT_TIMEOUT": "60", "ALGO": "2", "TASK_QUEUE_ENABLE": "2"}
    said = str(pytest.raises(ValueError, rank_environment, "npu", environ, {"NPU_ASD_ENABLE": "4"}).value)
    assert [line.split()[0] for line in said.splitlines()] == ["HCCL_CONNECT_TIMEOUT", "NPU_ASD_ENABLE", "ALGO"]


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


@pytest.mark.parametrize("kind", ["npu", "cuda", "cpu"])
def test_the_original_systems_variables_are_checked_everywhere(kind):
    with pytest.raises(ValueError, match="ALGO is '7'; it can be one of 0, 1, 3"):
        rank_environment(kind, {"ALGO": "7"}, {})


def test_a_runtime_says_it_before_it_starts_a_rank(monkeypatch):
    monkeypatch.setenv("ALGO", "7")
    with Runtime(device="cpu") as runtime:
        with pytest.raises(ValueError, match="ALGO is '7'.*unset ALGO"):
            runtime.ping()
        assert runtime.pids == []


# What is said of it


def lines_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "ascend_runtime.environment"]


def test_the_choice_is_logged_in_one_line_a_group(caplog, monkeypatch):
    for row in (*NPU, *ORIGINAL):
        monkeypatch.delenv(row.name, raising=False)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    before = dict(os.environ)
    with caplog.at_level(logging.INFO):
        RankGroup(2, "npu")  # not started
    (line,) = lines_of(caplog)
    assert "TASK_QUEUE_ENABLE=1 (given)" in line and "CPU_AFFINITY_CONF=1 (default)" in line
    assert set(re.findall(r"(\w+)=\S+ \(", line)) == set(OURS)
    assert dict(os.environ) == before


@pytest.mark.parametrize("name, value, words", [
    ("PRECISION", "0", "noise is drawn on the CPU"),
    ("ROPE_OPT", "1", "no such choice"), ("ROPE_OPT", "0", "no such choice"),
    ("ADA_LAYERNORM", "1", "no such choice"), ("QUANT_ALLTOALL", "0", "no such choice"),
])  # fmt: skip
def test_what_an_original_variable_cannot_change_is_logged(name, value, words, caplog):
    with caplog.at_level(logging.INFO):
        rank_environment("cpu", {name: value}, {})
    (line,) = lines_of(caplog)
    assert line.startswith(f"{name}={value}: ") and words in line


@pytest.mark.parametrize("name, value", [
    ("PRECISION", "1"), ("T5_LOAD_CPU", "0"), ("T5_LOAD_CPU", "1"), ("OVERLAP", "0"), ("OVERLAP", "1"), ("ALGO", "1"),
])  # fmt: skip
def test_what_is_done_anyway_is_not_worth_a_line(name, value, caplog):
    with caplog.at_level(logging.INFO):
        rank_environment("cpu", {name: value}, {})
    assert not lines_of(caplog)


# Operators


@pytest.mark.parametrize("environ, resolved", [
    ({}, OperatorSpec(attention="fused", layer_norm="fused")),
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


def test_real_ranks_on_a_cpu(new_runtime, monkeypatch):
    for row in NPU:
        monkeypatch.delenv(row.name, raising=False)
    monkeypatch.setenv("HCCL_BUFFSIZE", "nonsense")  # a stray one
    before = dict(os.environ)
    with new_runtime(2, ASCEND_TEST_OWN="1") as runtime:
        runtime.start()
        for pid in runtime.pids:
            theirs = environment_of(pid)
            set_by_us = {row.name for row in NPU} & theirs.keys()
            assert set_by_us == {"HCCL_BUFFSIZE", "TOKENIZERS_PARALLELISM"} and theirs["ASCEND_TEST_OWN"] == "1"
            changed = {name for name, value in before.items() if theirs.get(name) != value}
            assert changed <= {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONSAFEPATH", *HEAP, *LOOPBACK}
    assert dict(os.environ) == before


def test_nothing_is_exported_here():
    """Neither by the tables, nor by what reads them."""
    for name in ("environment", "host", "devices", "launcher"):
        code = (Path(__file__).parent.parent / "ascend_runtime" / f"{name}.py").read_text()
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
