"""What is wrong with a host, told before ranks start; what cures a rank's failure; and whose cores a rank computes on.

There is no NPU here: packages, device files and CANN are fakes in folders, and say so by their names.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ascend_runtime import ParallelSpec, RankDied, Runtime
from ascend_runtime.errors import code_of
from ascend_runtime.hardware import devices, host
from ascend_runtime.ops import libraries

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = {f"mindiesd/plugin/torch{v}/fake.so": f"sha256={v}" for v in (27, 29, 210, 211, 212, 213)}  # mindiesd 3.1.0's


@pytest.fixture
def fake_host(tmp_path, monkeypatch):
    """A host with nothing of Ascend; `packages` and `cards` add fakes to it."""
    site, dev = tmp_path / "fake_site", tmp_path / "fake_dev"
    site.mkdir()
    dev.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(host, "DEVICE_FILES", dev)
    for name in ("ASCEND_HOME_PATH", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for once in (host.warn_of_idle_npus, host.warn_of_mindiesd):
        once.cache_clear()

    class FakeHost:
        def package(self, name, version, files={}):  # file -> its hash
            (site / name).mkdir()
            (site / name / "__init__.py").write_text(f"raise ImportError('the fake {name} was imported')")
            info = site / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            (info / "RECORD").write_text("".join(f"{file},{files.get(file, '')},\n" for file in files))

        def torch(self, version):
            info = site / f"torch-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

        def cards(self, count, manager=True):
            for name in [f"davinci{n}" for n in range(count)] + ["davinci_manager"] * manager:
                (dev / name).touch()

        def driver(self):
            tool = tmp_path / "fake_bin" / "npu-smi"
            tool.parent.mkdir()
            tool.write_text("#!/bin/sh\n")
            tool.chmod(0o755)
            monkeypatch.setenv("PATH", str(tool.parent), prepend=":")

        def cann(self):
            (tmp_path / "fake_cann").mkdir()
            monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "fake_cann"))

    return FakeHost()


def said_of(part, environ=None):
    """The one problem that speaks of `part`."""
    (found,) = [said for said in map(str, host.problems(os.environ if environ is None else environ)) if part in said]
    return found


# Packages


def test_without_torch_npu(fake_host):
    assert "Install the torch_npu of the same release as torch" in said_of("torch_npu is not installed")


@pytest.mark.parametrize("torch_version, npu, fits", [
    ("2.13.0", "2.13.0", True), ("2.13.0+cpu", "2.13.0rc1", True), ("2.7.1", "2.7.1.post2", True),
    ("2.13.0", "2.12.0", False), ("2.1.0", "2.10.0", False), ("2.9.1+cpu", "2.8.0", False),
])  # fmt: skip
def test_torch_and_torch_npu_are_of_one_release(fake_host, torch_version, npu, fits):
    fake_host.torch(torch_version)
    fake_host.package("torch_npu", npu)
    if fits:
        assert not [problem for problem in host.problems() if problem.code == "AV-1003"]
    else:
        said, release = said_of(f"torch is {torch_version} and torch_npu is {npu}"), npu.rpartition(".")[0]
        assert f"Install torch {release}, or torch_npu {'.'.join(torch_version.split('.')[:2])}." in said


@pytest.mark.parametrize("torch_version, fits", [("2.7.1", True), ("2.13.0+cpu", True), ("2.8.0", False)])
def test_mindiesd_that_was_made_for_other_torches(fake_host, caplog, torch_version, fits):
    fake_host.torch(torch_version)
    fake_host.package("mindiesd", "3.1.0", PLUGINS)
    with caplog.at_level(logging.WARNING):
        host.warn_of_mindiesd()
        host.warn_of_mindiesd()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (0 if fits else 1)
    if not fits:
        assert "plug-ins for torch 2.7, 2.9, 2.10, 2.11, 2.12, 2.13, but this is torch 2.8.0" in said[0]


@pytest.mark.parametrize("torch_version", ["2.9.0", "2.7.1", "2.10.0"])
def test_a_copied_plugin_of_mindiesd_is_not_loaded(fake_host, caplog, torch_version):
    """As in the wheel 3.1.0 for Python 3.11 on x86_64, whose plug-in for torch 2.9 is that for 2.7."""
    fake_host.torch(torch_version)
    older, copied = (f"mindiesd/plugin/torch{v}/fake.so" for v in (27, 29))
    fake_host.package("mindiesd", "3.1.0", PLUGINS | {copied: PLUGINS[older]})
    libraries.mindiesd.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert libraries.mindiesd() is None  # the fake cannot be imported, which is logged where it was tried
    libraries.mindiesd.cache_clear()
    (said,) = (record.getMessage() for record in caplog.records)
    if torch_version == "2.9.0":
        assert "its plug-in for torch 2.7 as the one for torch 2.9, which would end the process" in said
    else:
        assert "the fake mindiesd was imported" in said


# Driver and CANN


def test_no_driver(fake_host, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    said = said_of("no npu-smi")
    assert "davinci*" in said and "Install it" in said and "/dev/davinci_manager" in said


@pytest.mark.parametrize("cards, missing", [(0, "davinci*"), (2, "davinci_manager")])
def test_a_container_without_its_devices(fake_host, cards, missing):
    fake_host.driver()
    fake_host.cards(cards, manager=not cards)
    said = said_of(f"fake_dev/{missing}")
    assert "--device" in said and "npu-smi info" in said


def test_a_card_that_is_not_there(fake_host):
    fake_host.cards(2)
    said = said_of("ASCEND_RT_VISIBLE_DEVICES", {"ASCEND_RT_VISIBLE_DEVICES": "1,2,5"})
    assert "contains 2, 5, but the 2 card(s) here are numbered 0 to 1" in said
    assert not [problem for problem in host.problems({"ASCEND_RT_VISIBLE_DEVICES": "0,1"}) if problem.code == "AV-1009"]


def test_an_empty_list_of_cards_is_none(fake_host):
    fake_host.cards(2)
    fake_host.package("torch_npu", "2.13.0")
    assert host.visible_cards({"ASCEND_RT_VISIBLE_DEVICES": ""}) == host.visible_cards({}) == 2


# Numbers of PCI devices: (Huawei's, another's) -> the line
PCI = [
    (["0xd802"] * 8, [], "a2"), (["0xd803"] * 16, ["0x2330"], "a3"), (["0xd500"], [], "310P"), (["0xd801"], [], "910"),
    ([], ["0xd802"], None), (["0xd802", "0xd500"], [], None), (["0x1822", "0xa121", "0xd802"], [], "a2"),
    (["0x1822"], [], None), ([], [], None),
]  # fmt: skip


@pytest.mark.parametrize("numbers, others, line", PCI)
def test_the_line_of_the_cards_is_known_before_a_rank_starts(tmp_path, monkeypatch, numbers, others, line):
    monkeypatch.setattr(host, "PCI_DEVICES", tmp_path)
    devices = [*[("0x19e5", number) for number in numbers], *[("0x10de", number) for number in others]]
    for place, (vendor, number) in enumerate(devices):
        folder = tmp_path / f"0000:{place:02x}:00.0"
        folder.mkdir()
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "device").write_text(f"{number}\n")
    (tmp_path / "0000:ff:00.0").mkdir()  # a device that is just being removed
    assert host.npu_line() == line


@pytest.mark.parametrize("line, card", [("310P", "Atlas 300I Duo"), ("910", "Ascend 910 of 2019")])
def test_a_card_that_cannot_run_the_models_is_refused_before_a_rank_starts(fake_host, monkeypatch, line, card):
    monkeypatch.setattr(host, "npu_line", lambda: line)
    assert "Use cards of the A2, A3 or 950 series" in said_of(card)


def test_cann_that_is_not_set_up(fake_host, monkeypatch):
    assert said_of("ASCEND_HOME_PATH is not set", {"ASCEND_HOME_PATH": ""})
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in said_of("ASCEND_HOME_PATH is not set")
    monkeypatch.setenv("ASCEND_HOME_PATH", "/nowhere/cann")
    assert "set_env.sh" in said_of("ASCEND_HOME_PATH is '/nowhere/cann', which is not a folder")


@pytest.mark.parametrize("library", ["libascendcl.so", "libhccl.so"])
def test_cann_whose_libraries_are_not_found(fake_host, library):
    fake_host.cann()
    said = said_of(f"CANN's {library} cannot be loaded")
    assert "cannot open shared object file" in said and "set_env.sh" in said


# Who is told


def test_all_of_it_comes_in_one_error_before_a_rank_starts(fake_host):
    fake_host.torch("2.13.0")
    fake_host.package("torch_npu", "2.12.0")
    fake_host.cards(2, manager=False)
    with Runtime(ParallelSpec(ranks=2), device="npu") as runtime:
        with pytest.raises(ValueError) as error:
            runtime.ping()
        assert runtime.pids == []
    for words in ("AV-1003: torch is 2.13.0 and torch_npu is 2.12.0", "AV-1007: There is no", "davinci_manager",
                  "AV-1002: CANN is not set up: ASCEND_HOME_PATH"):  # fmt: skip
        assert words in str(error.value)


def test_an_npu_that_was_asked_for_and_is_not_there(fake_host):
    fake_host.torch("2.13.0")
    fake_host.package("torch_npu", "2.12.0")
    said = str(pytest.raises(ValueError, Runtime, device="npu").value)
    assert "no such device is visible" in said and "'auto'" in said and "torch_npu is 2.12.0" in said


def test_auto_takes_npus_where_there_are_some(fake_host):
    fake_host.cards(3)
    fake_host.package("torch_npu", "2.13.0")
    assert devices.resolve_kind("auto") == "npu" and devices.resolve_ranks(0, "npu") == 3


def test_cards_without_torch_npu_are_not_counted(fake_host):
    fake_host.cards(3)
    assert devices.count_visible("npu") == 0


def test_auto_says_once_why_npus_are_not_used(fake_host, caplog):
    fake_host.package("torch_npu", "2.13.0")
    with caplog.at_level(logging.WARNING):
        assert devices.resolve_kind("auto") == devices.resolve_kind("auto") != "npu"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "torch_npu is installed, but no NPU is used" in said and "davinci" in said


def test_auto_says_nothing_where_nothing_is_installed(fake_host, caplog):
    with caplog.at_level(logging.WARNING):
        devices.resolve_kind("auto")
    assert not caplog.records


def test_the_runtimes_own_list_of_cards_counts(fake_host):
    fake_host.cards(8)
    fake_host.package("torch_npu", "2.13.0")
    assert Runtime(device="npu", environment={"ASCEND_RT_VISIBLE_DEVICES": "2,3"}).world_size == 2
    with pytest.raises(ValueError, match="ranks is 3, but 2 npu"):
        Runtime(ParallelSpec(ranks=3), device="npu", environment={"ASCEND_RT_VISIBLE_DEVICES": "2,3"})


# Advice


@pytest.mark.parametrize("failure, words", [
    ("ImportError: libhccl.so: cannot open shared object file: No such file or directory", "set_env.sh"),
    ("ImportError: libascend_hal.so: cannot open shared object file", "/usr/local/Ascend/driver/lib64"),
    ("ImportError: cannot import name 'x' from 'torch_npu.y'", f"torch {torch.__version__.split('+')[0]}"),
    ("RuntimeError: Failed to find function aclrtSetDeviceSatMode", "CANN the version that"),
    ("RuntimeError: Unsupported soc version: Ascend950PR 9589", "For the 950 series, 2.7.1.post8"),
    ("RuntimeError: Unrecognized CachingAllocator option: pinned_max_round_threshold_mb", "Leave the key out"),
    ("createHCCLComm: HcclGetRootInfo(&hcclID), error code is 7", "HCCL_HOST_SOCKET_PORT_RANGE"),
    ("HCCL function error: HcclGetRootInfo(&hcclID), error code is 11", "ip_local_reserved_ports=60000-60031"),
    ("RuntimeError: NPU out of memory. Tried to allocate 2.00 GiB", "npu-smi info"),
    ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "nvidia-smi"),
    ("AcceleratorError: CUDA error: out of memory", "nvidia-smi"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
     "tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)", "dtype bfloat16"),
    ("MemoryError: Unable to allocate 9. GiB for an array", "free -h"),
    ("OSError: [Errno 12] Cannot allocate memory", "free -h"),
    ("terminate called after throwing an instance of 'std::bad_alloc'", "free -h"),
    ("Rank 1 of 8 was killed by SIGKILL. Its last output:", "dmesg"),
    ("Rank 0 of 2 was killed by SIGBUS. Its last output:", "A model's file was truncated"),
])  # fmt: skip
def test_known_failures_come_with_what_cures_them(failure, words):
    said = host.advise(failure, "AV-1510")
    code = code_of(said)
    assert said.startswith(f"{code}: {failure}\nWhat helps ({code}): ") and said.count("What helps") == 1
    assert words in said


@pytest.mark.parametrize("failure", ["KeyError: 'x'", "HcclGetRootInfo(&hcclID), error code is 71", "out of memoryx"])
def test_unknown_failures_get_the_code_of_what_happened(failure):
    assert host.advise(failure, "AV-1510") == f"AV-1510: {failure}"


def test_the_first_cause_is_in_front_and_each_advice_has_its_own():
    failure = "Rank 1 of 2 was killed by SIGKILL. Its last output:\nRuntimeError: AV-1203: NPU out of memory"
    said = host.advise(failure, "AV-1503").split("\n")
    assert said[:2] == [f"AV-1203: {failure.splitlines()[0]}", "RuntimeError: NPU out of memory"]
    assert [line[:20] for line in said[2:]] == ["What helps (AV-1201)", "What helps (AV-1501)"]


def test_a_real_rank_that_cannot_start_is_advised(tmp_path):
    (tmp_path / "msgspec.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")  # a fake
    with Runtime(ParallelSpec(ranks=2), device="cpu", environment={"PYTHONPATH": str(tmp_path)}) as runtime:
        with pytest.raises(RankDied, match="(?s)exit code 1.*libhccl.so.*What helps .AV-1002.: .*set_env.sh"):
            runtime.ping()


# Devices


def test_what_a_cpu_computes_in():
    cpu = torch.device("cpu")
    assert devices.default_dtype(cpu) == torch.float32 and devices.card(cpu) is None
    assert devices.default_dtype(torch.device("cuda")) == torch.bfloat16


ALL_CORES = """
import os, threading
from ascend_runtime.hardware import devices
import torch

torch.set_num_threads(len(devices.CORES))
torch.ones(2**20).sum()  # starts the pool
wait = threading.Event()
threads = [threading.Thread(target=wait.wait, daemon=True) for _ in range(2)]
for thread in threads: thread.start()
tasks = lambda: {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")}

cores = sorted(devices.CORES)
for number, task in enumerate(sorted(tasks())):  # as CPU_AFFINITY_CONF has torch_npu do, each on a core of its own
    os.sched_setaffinity(task, {cores[number % len(cores)]})
torch.set_num_threads(1)
before = tasks()
late = threading.Thread(target=wait.wait, daemon=True)
try:
    with devices.all_cores():
        inside = tasks()
        assert set(before) <= set(inside) and all(theirs == devices.CORES for theirs in inside.values()), inside
        assert torch.get_num_threads() == int(os.environ.get("ASCEND_RUNTIME_ALL_THREADS", 1))
        late.start()
        raise KeyError
except KeyError:
    pass
after = tasks()
assert {task: after[task] for task in before} == before, (before, after)
assert after[late.native_id] == before[os.getpid()] and torch.get_num_threads() == 1
wait.set()
print(len(before), "threads")
"""


@pytest.mark.parametrize("threads", [{"ASCEND_RUNTIME_ALL_THREADS": "3"}, {}], ids=["ours", "the user's"])
def test_all_cores_are_lent_to_every_thread_and_given_back(threads):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **threads}
    done = subprocess.run([sys.executable, "-c", ALL_CORES], cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 3
