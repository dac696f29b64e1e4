"""What the client would start on NPUs, and what a rank does with its card, over the real torch_npu.

No collective runs: the stubs of CANN have no HCCL. What HCCL makes of its variables is not tested here.
"""

import os
from importlib import metadata

import pytest
import torch
import torch.distributed as dist
from ascend_runtime.hardware import devices, host
from ascend_runtime.hardware.environment import NPU, ORIGINAL_VARIABLES
from ascend_runtime.client.group import RankGroup

CARDS = {"Ascend910B4": "a2", "Ascend910_9391": "a3", "Ascend950PR_9589": "a5"}  # SoC name by CANN: line
UNFIT = {"Ascend310P3": "Atlas 300I Duo", "Ascend910A": "Ascend 910 of 2019", "Ascend310B1": "310B series"}
reports_level = pytest.mark.skipif(
    not hasattr(torch.npu.utils, "get_task_queue_enable"),
    reason=f"torch_npu {metadata.version('torch_npu')} cannot be asked for its queue's level",
)


@pytest.fixture
def clean(monkeypatch):
    for row in (*NPU, *ORIGINAL_VARIABLES):
        monkeypatch.delenv(row.name, raising=False)


def environments(group):
    """What each rank of a group that is not started would be started with."""
    return [group._rank_environment(rank, control=99, store=98) for rank in range(group.world_size)]


# What ranks are started with


def test_the_environment_of_each_rank(clean, monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # a ComfyUI that wants no NPU for itself
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    before = dict(os.environ)
    ranks = environments(RankGroup(4, "npu", {"HCCL_EXEC_TIMEOUT": "900"}))
    assert dict(os.environ) == before
    for number, environment in enumerate(ranks):
        expected = {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1", "ASCEND_RUNTIME_DEVICE": "npu",
            "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "CPU_AFFINITY_CONF": "1",
            "TOKENIZERS_PARALLELISM": "false", "HCCL_CONNECT_TIMEOUT": "600", "HCCL_HOST_SOCKET_PORT_RANGE": "auto",
            "HCCL_NPU_SOCKET_PORT_RANGE": "auto", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
            "TASK_QUEUE_ENABLE": "1", "HCCL_EXEC_TIMEOUT": "900",
            "ASCEND_RT_VISIBLE_DEVICES": "4,5,6,7",  # the same for all: a rank takes the card of its local rank
        }  # fmt: skip
        assert {name: environment.get(name) for name in expected} == expected
    assert len({environment["ASCEND_RUNTIME_STORE_FD"] for environment in ranks}) == 1  # where they meet


def test_torch_npu_takes_our_variables(clean, python_on):
    """It reads them when the first card is taken, and ends the process where it takes one amiss."""
    (environment,) = environments(RankGroup(1, "npu"))
    ours = {row.name: environment[row.name] for row in NPU if row.name in environment}
    code = """
        import torch
        torch.npu.set_device(0)
        x = torch.ones(2**20).to("npu")
        print(torch.equal(x.cpu(), torch.ones(2**20)))
    """
    assert python_on("Ascend910B4", code, variables=ours) == "True"
    assert ours["TASK_QUEUE_ENABLE"] == "2"


@reports_level
def test_torch_npu_takes_our_level_of_its_queue(clean, python_on):
    code = "import torch; torch.npu.set_device(0); print(torch.npu.utils.get_task_queue_enable())"
    assert python_on("Ascend910B4", code, variables={"TASK_QUEUE_ENABLE": "2"}) == "2"


@pytest.mark.parametrize("name, value", [
    pytest.param("TASK_QUEUE_ENABLE", "3", marks=reports_level),
    ("PYTORCH_NPU_ALLOC_CONF", "segments:True"),
])  # fmt: skip
def test_torch_npu_refuses_what_we_refuse(clean, python_on, name, value):
    with pytest.raises(ValueError, match=name):
        RankGroup(1, "npu", {name: value})
    code = """
        import torch
        try:
            torch.npu.set_device(0)
            torch.npu.utils.get_task_queue_enable()
            torch.ones(4).to("npu")
            print("taken")
        except (RuntimeError, ValueError) as error:
            print("refused")
    """
    assert python_on("Ascend910B4", code, variables={name: value}) == "refused"


@reports_level
def test_blocking_overrules_the_task_queue(clean, python_on):
    """So ASCEND_LAUNCH_BLOCKING=1 needs no other TASK_QUEUE_ENABLE, and ours stays."""
    both = {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": "2"}
    code = "import torch; torch.npu.set_device(0); print(torch.npu.utils.get_task_queue_enable())"
    assert python_on("Ascend910B4", code, variables=both) == "0"


# HCCL


def test_the_backend_of_npus_is_hccl():
    assert devices.BACKENDS["npu"] == "cpu:gloo,npu:hccl"
    assert dist.is_backend_available("hccl") and "npu" in dist.Backend.backend_capability["hccl"]
    assert dist.Backend.default_device_backend_map["npu"] == "hccl"
    assert dist.BackendConfig(dist.Backend(devices.BACKENDS["npu"])).get_device_backend_map() == {
        "cpu": "gloo", "npu": "hccl",
    }  # fmt: skip


def test_a_group_of_both_backends_is_joined(clean, python_on):
    """As engine/machine/joining.py joins it. HCCL itself comes with a card's first exchange: not here."""
    code = """
        import os, torch, torch.distributed as dist
        from ascend_runtime.engine.machine.joining import join_group
        from ascend_runtime.hardware import devices
        store = os.memfd_create("ascend-store")
        os.environ.update(RANK="0", WORLD_SIZE="1", ASCEND_RUNTIME_STORE_FD=str(store))
        device = devices.take("npu", 0)
        join_group("npu")
        group = dist.distributed_c10d._get_default_group()
        dist.all_reduce(torch.ones(2))
        assert callable(group._get_backend(device).get_hccl_comm_name)  # which npu_mm_all_reduce_base is told
        print(type(group._get_backend(device)).__name__, type(group._get_backend(torch.device("cpu"))).__name__)
    """
    joined = python_on("Ascend910B4", code).splitlines()  # Gloo of torch before 2.10 prints a line too
    assert joined[-1] == "ProcessGroupHCCL ProcessGroupGloo"


def test_a_job_reports_the_memory_of_communicators(python_on):
    """As HCCL's page of HCCL_BUFFSIZE counts it: two buffers each. None of a rank that exchanges with nobody."""
    code = """
        import os, torch
        from ascend_runtime.engine import pipeline
        device = torch.device("npu", 0)
        print(pipeline._communicators(device))
        pipeline.communicators = lambda: 3
        print(pipeline._communicators(device), pipeline._communicators(torch.device("cpu")))
        os.environ["HCCL_BUFFSIZE"] = "100"
        print(pipeline._communicators(device))
    """
    three = "{{'communicators': '3 a rank, {} GB'}}".format
    expected = ["{}", three(1.3) + " {}", three(0.6)]  # 3 x 2 x 200 and 3 x 2 x 100 MB of 2**20 bytes
    assert python_on("Ascend910B4", code).splitlines() == expected


# A rank's card


def test_taking_a_card(python_on):
    """The local rank is the card's number; both switches are set before there is a card."""
    code = """
        import torch, torch_npu
        calls, set_option = [], torch_npu._C._npu_setOption
        torch_npu._C._npu_setOption = lambda option: (calls.append((option, torch.npu.is_initialized())),
                                                      set_option(option))
        from ascend_runtime.hardware import devices
        device = devices.take("npu", 1)
        ours = {name: value for option, had_card in calls if not had_card for name, value in option.items()}
        print(device, torch.npu.current_device(), ours.get("jitCompile"), ours.get("ALLOW_INTERNAL_FORMAT"))
        devices.synchronise(device)
        devices.empty_cache(device)
    """
    assert python_on("Ascend910B4", code, devices=2) == "npu:1 1 disable disable"


@pytest.mark.parametrize("soc", CARDS)
def test_which_card_and_which_dtype(python_on, soc):
    code = """
        from ascend_runtime.hardware import devices
        device = devices.take("npu", 0)
        print(devices.card(device), devices.default_dtype(device))
    """
    assert python_on(soc, code) == f"{CARDS[soc]} torch.bfloat16"


@pytest.mark.parametrize("soc", UNFIT)
def test_a_card_that_cannot_run_the_models_is_refused_by_name(python_on, soc):
    code = """
        from ascend_runtime.hardware import devices
        try:
            devices.take("npu", 0)
        except ValueError as error:
            print(error)
    """
    said = python_on(soc, code)
    assert UNFIT[soc] in said and "Use cards of the A2, A3 or 950 series" in said


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be divided")
def test_cores_are_divided_by_the_number_of_the_card_and_lent_for_work_on_the_cpu(clean, python_on):
    """Why all ranks must see all cards; and that `all_cores` takes back what torch_npu has really bound."""
    bound = {"CPU_AFFINITY_CONF": "1", "TASK_QUEUE_ENABLE": "2"}
    code = """
        import time, torch
        from ascend_runtime.hardware import devices
        devices.take("npu", {number})
        torch.ones(8).to("npu")
        torch.npu.synchronize()
        before, same = devices._affinities(), 0
        while same < 5:  # torch_npu's own threads bind themselves when they get to it
            time.sleep(0.1)
            now = devices._affinities()
            before, same = now, same + 1 if now == before else 0
        with devices.all_cores():
            assert all(cores == devices.CORES for cores in devices._affinities().values())
        after = devices._affinities()
        assert before == {{thread: after[thread] for thread in before}}
        bound = [cores for cores in before.values() if cores != devices.CORES]
        print(*set().union(*bound))
    """
    first, second = (
        set(python_on("Ascend910B4", code.format(number=n), devices=2, variables=bound).split()) for n in (0, 1)
    )
    assert first and second - first  # torch_npu's start on card 0 leaves threads there, whichever card is taken


# This host


def test_stub_cann_is_set_up_and_has_no_driver():
    """What is found wrong is that there is no card, and nothing else: versions and libraries are as they should be."""
    found = host.problems()
    assert [fault.code for fault in found] == ["AV-1001"]


def test_mindiesd_fits_this_torch(caplog):
    host.warn_of_mindiesd.cache_clear()
    host.warn_of_mindiesd()
    assert not caplog.records and torch.__version__.startswith(host._release(torch.__version__))
