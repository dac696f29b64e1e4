"""`doctor` finds each planted fault of a host by its code, and nothing else; and nothing on a healthy host.

There is no NPU here and no GPU: the hosts are played (see played_host), except where a test says that it is this one.
"""

import errno
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml  # noqa: F401, as a played host has none
from ascend_runtime.commands.doctor import (
    cards,
    command,
    comfyui,
    model_files,
    packages,
    processes,
    surroundings,
    table,
)
from ascend_runtime.commands.doctor.findings import ERROR, FINDING_LEVELS, OK, WARNING, Finding
from ascend_runtime.commands.doctor.surroundings import MOST_OUTPUT, Space, Surroundings, kind_of
from ascend_runtime.errors import CODES
from ascend_runtime.hardware import environment, memory  # noqa: F401, the same
from ascend_runtime.specs import cluster  # noqa: F401, the same
from played_host import GB, PACKAGES, PlayedHost

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = {f"mindiesd/plugin/torch{v}/fake.so": f"sha256={v}" for v in (27, 29, 210, 211, 212, 213)}
HEALTHY = [("npu", "a2"), ("npu", "a3"), ("cuda", "a2"), ("cpu", "a2")]


@pytest.mark.parametrize("kind, line", HEALTHY, ids=["A2", "A3", "CUDA", "CPU"])
def test_a_healthy_host_has_neither_warnings_nor_errors(tmp_path, monkeypatch, kind, line):
    assert PlayedHost(tmp_path, kind, line).examine(monkeypatch) == []


# A fault: (name, code, level, kind of the host, what plants it). None of them has any other finding.
FAULTS = []


def fault(code, level=ERROR, kind="npu", name=None):
    """Declares what plants a fault. Its name says what is wrong."""

    def declare(plant):
        named = (name or plant.__name__).replace("_", " ").strip()
        FAULTS.append(pytest.param(kind, code, level, plant, id=f"{named} ({code})"))
        return plant

    return declare


@pytest.mark.parametrize("kind, code, level, plant", FAULTS)
def test_a_planted_fault_is_found_by_its_code_and_nothing_else_is(tmp_path, monkeypatch, kind, code, level, plant):
    host = PlayedHost(tmp_path, kind)
    plant(host)
    found = host.examine(monkeypatch)
    assert {(finding.code, finding.level) for finding in found} == {(code, level)}, found
    assert code in CODES and all(finding.cure and finding.found for finding in found)


# Packages, driver, CANN


@fault("AV-1003")
def torch_npu_of_another_release(host):
    host.package("torch_npu", "2.12.0")


@fault("AV-1006")
def no_torch_npu(host):
    host.remove_package("torch_npu")
    (host.site / "torch_npu" / "__init__.py").unlink()
    (host.site / "torch_npu").rmdir()


@fault("AV-1001")
def no_driver(host):
    for file in host.dev.glob("davinci*"):
        file.unlink()
    (host.bin / "npu-smi").unlink()


@fault("AV-1007")
def a_container_without_the_manager(host):
    (host.dev / "davinci_manager").unlink()


@fault("AV-1007")
def a_container_without_cards(host):
    for file in host.dev.glob("davinci[0-9]*"):
        file.unlink()
    host.script("npu-smi", "echo no device >&2; exit 1")


@fault("AV-1008")
def a_card_of_the_310P_series(host):
    for file in host.root.glob("sys/bus/pci/devices/*/device"):
        file.write_text("0xd500\n")


@fault("AV-1009")
def a_chosen_card_that_is_not_there(host):
    host.environ["ASCEND_RT_VISIBLE_DEVICES"] = "0,8"


@fault("AV-1010", WARNING)
def mindiesd_without_a_plugin_for_this_torch(host):
    host.package("mindiesd", "3.1.0", {name: digest for name, digest in PLUGINS.items() if "213" not in name})


@fault("AV-1010", WARNING)
def mindiesd_with_a_copied_plugin(host):
    host.package("torch", "2.9.0")
    host.package("torch_npu", "2.9.0.post6")
    older, copied = (f"mindiesd/plugin/torch{v}/fake.so" for v in (27, 29))
    host.package("mindiesd", "3.1.0", PLUGINS | {copied: PLUGINS[older]})


@fault("AV-1002")
def CANN_that_is_not_set_up(host):
    for name in ("ASCEND_HOME_PATH", "LD_LIBRARY_PATH", "PYTHONPATH"):
        del host.environ[name]


@fault("AV-1002")
def a_library_of_CANN_that_cannot_be_loaded(host):
    host.libraries.remove("libhccl.so")


@fault("AV-1003", WARNING)
def CANN_older_than_torch_npu_needs(host):
    host.package("torch", "2.7.1")
    host.package("torch_npu", "2.7.1.post8")
    for file in host.cann.glob("*-linux/*.info"):
        file.write_text("version=8.5.0\n")


@fault("AV-1003", WARNING)
def operators_of_another_CANN_than_the_toolkit(host):
    host.write("cann/x86_64-linux/ascend_ops_install.info", "version=8.5.0\n")


@fault("AV-1011", WARNING)
def a_PYTHONPATH_that_hides_the_operator_compiler(host):
    host.write("mine/tbe/__init__.py", "")
    host.environ["PYTHONPATH"] += f":{host.root}/mine"


@fault("AV-1011", WARNING)
def a_PYTHONPATH_without_CANN(host):
    host.environ["PYTHONPATH"] = "/opt/mine"


@fault("AV-1011", WARNING)
def libraries_of_another_CANN(host):
    host.write("old-cann/lib64/libascendcl.so", "")
    host.environ["LD_LIBRARY_PATH"] = f"{host.root}/old-cann/lib64:{host.cann}/lib64"


@fault("AV-1012")
def a_driver_that_does_not_answer(host):
    host.script("npu-smi", "echo dcmi model initialized failed, because the device is used >&2; exit 255")


@fault("AV-1012", kind="cuda")
def an_NVIDIA_driver_that_does_not_answer(host):
    host.script("nvidia-smi", "echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9")


@fault("AV-1017", kind="cuda")
def a_torch_without_CUDA(host):
    host.package("torch", "2.13.0+cpu")


@fault("AV-1017", kind="cuda")
def a_container_without_GPUs(host):
    for file in host.dev.glob("nvidia*"):
        file.unlink()
    (host.bin / "nvidia-smi").unlink()


@fault("AV-1014")
def an_old_Python(host):
    host.version = (3, 9)


@fault("AV-1015", kind="cpu")
def a_missing_package(host):
    host.remove_package("msgspec")


@fault("AV-1015", kind="cpu")
def an_old_transformers(host):
    host.package("transformers", "4.49.0")


@fault("AV-1015", kind="cpu")
def a_diffusers_that_is_too_new(host):
    host.package("diffusers", "0.43.0")


@fault("AV-1015", WARNING, kind="cuda")
def an_old_torch(host):
    host.package("torch", "2.6.0+cu124")


@fault("AV-1016")
def a_package_that_cannot_be_imported(host):
    host.script("python", """echo '{"torch": "ImportError: libhccl.so: cannot open shared object file"}'""")


@fault("AV-1016", kind="cpu")
def a_package_that_crashes(host):
    host.script("python", "kill -11 $$")


# Cards


@fault("AV-1013")
def an_unhealthy_card(host):
    host.npu_smi(health={3: "Alarm"})


@fault("AV-1013", kind="cuda")
def a_GPU_with_memory_errors(host):
    host.nvidia_smi(ecc="2")


@fault("AV-1105")
def a_card_that_another_program_fills(host):
    host.npu_smi(used={5: 61125}, holders=[(5, 0, 1333928, 57709)])


@fault("AV-1105", WARNING)
def a_card_that_another_program_uses_a_little(host):
    host.npu_smi(used={0: 7000}, holders=[(0, 0, 4711, 3500)])


@fault("AV-1105")
def a_card_that_an_unseen_program_fills(host):
    host.npu_smi(used={0: 41697})


@fault("AV-1105", kind="cuda")
def a_GPU_that_another_program_fills(host):
    host.nvidia_smi(used=60000, apps="GPU-2, 4711, 60000, python, main.py\n")


# Ports, interfaces, variables


@fault("AV-1101", WARNING)
def a_busy_port(host):
    host.port(60003)


@fault("AV-1101")
def a_busy_port_that_was_chosen(host):
    host.environ["HCCL_IF_BASE_PORT"] = "30000"
    host.port(30031, name="tcp6")


@fault("AV-1101")
def a_busy_port_of_a_chosen_range(host):
    host.environ["HCCL_HOST_SOCKET_PORT_RANGE"] = "61000,61050-61100"
    host.port(61077, state="01")


@fault("AV-1104")
def an_interface_that_is_down(host):
    host.environ["HCCL_SOCKET_IFNAME"] = "=eth0"
    host.interface("eth0", up=False, state="down")


@fault("AV-1104")
def an_interface_without_a_cable(host):
    host.environ["HCCL_SOCKET_IFNAME"] = "eth"
    host.interface("eth0", up=True, state="lowerlayerdown")


@fault("AV-1104")
def an_interface_that_is_not_there(host):
    host.environ["HCCL_SOCKET_IFNAME"] = "enp"


@fault("AV-1103")
def a_bad_variable(host):
    host.environ["TASK_QUEUE_ENABLE"] = "3"


@fault("AV-1103")
def two_variables_for_one_allocator(host):
    host.environ |= {f"PYTORCH_{name}ALLOC_CONF": "expandable_segments:True" for name in ("", "NPU_")}


@fault("AV-1103", kind="cpu")
def a_bad_number_of_threads(host):
    host.environ["OMP_NUM_THREADS"] = "many"


# Memory, cores, limits


@fault("AV-1106", WARNING, kind="cpu")
def little_memory(host):
    host.write("proc/meminfo", (host.proc / "meminfo").read_text().replace(f"{8 * 10**8} kB", "12000000 kB"))


@fault("AV-1107", WARNING)
def a_container_with_little_memory(host):
    host.write("cgroup/memory.max", f"{16 * GB}\n")
    host.write("cgroup/memory.current", f"{2 * GB}\n")
    host.write("cgroup/memory.stat", "active_file 0\ninactive_file 1000\n")


@fault("AV-1108", WARNING)
def a_CPU_without_bfloat16(host):
    host.write("proc/cpuinfo", "Features\t: fp asimd\nFeatures\t: fp asimd bf16\n")


@fault("AV-1109", WARNING)
def a_container_with_few_cores(host):
    host.write("cgroup/cpu.max", "200000 100000\n")


@fault("AV-1102")
def a_container_with_few_processes(host):
    host.write("cgroup/pids.max", "512\n")
    host.write("cgroup/pids.current", "100\n")


@fault("AV-1102")
def a_low_ulimit_of_processes(host):
    host.limits[resource.RLIMIT_NPROC] = 300


@fault("AV-1110")
def a_low_ulimit_of_files(host):
    host.limits[resource.RLIMIT_NOFILE] = 256


@fault("AV-1208", WARNING, kind="cuda")
def a_small_dev_shm(host):
    host.space = Space(64 * 10**6, 60 * GB)


# Processes


@fault("AV-1111")
def a_rank_whose_client_is_gone(host):
    host.process(700, 1, command=f"python -m {processes.WORKER}", variables="RANK=0\0ASCEND_RUNTIME_PARENT=600\0")
    host.process(1, 0, program="systemd")


@fault("AV-1111")
def a_rank_that_hangs_in_the_driver(host):
    host.process(700, 1, state="D", command=f"python -m {processes.WORKER}")
    host.process(1, 0, program="tini")


@fault("AV-1113", WARNING)
def many_ended_processes(host):
    for pid in range(1000, 1060):
        host.process(pid, 1, state="Z")


def test_ranks_in_use_are_left_in_peace(tmp_path, monkeypatch):
    """Also one of another user, whose variables cannot be read; and their memory on cards is not another program's."""
    host = PlayedHost(tmp_path, "npu")
    host.process(1, 0, command="python main.py --cpu")
    host.process(600, 1, command="python main.py --cpu")
    host.process(700, 600, command=f"python -m {processes.WORKER}", variables="ASCEND_RUNTIME_PARENT=600\0")
    host.process(701, 600, command=f"python -m {processes.WORKER}")
    host.process(702, 700, command=f"python -m {processes.WORKER}", variables="ASCEND_RUNTIME_PARENT=600\0")
    host.process(800, 1, command="python main.py")  # in a container, which numbers its processes from 1
    host.write("proc/800/status", "Name:\tpython\nNSpid:\t800\t1\n")
    host.process(801, 800, command=f"python -m {processes.WORKER}", variables="ASCEND_RUNTIME_PARENT=1\0")
    host.npu_smi(used={0: 50000, 1: 50000}, holders=[(0, 0, 700, 47000), (1, 0, 701, 47000), (1, 0, 999, 40)])
    assert host.examine(monkeypatch) == []
    assert processes.ranks_in_use(host.around()) == {700, 701, 702, 801}


# ComfyUI and models


@fault("AV-1701", kind="cpu")
def an_old_ComfyUI(host):
    host.write("comfyui/comfyui_version.py", '__version__ = "0.3.47"\n')


@fault("AV-1702", kind="cpu")
def a_ComfyUI_that_is_not_there(host):
    host.environ["COMFYUI_DIR"] = "/nowhere"


@fault("AV-1703", kind="cpu")
def broken_extra_paths(host):
    host.write("comfyui/extra_model_paths.yaml", "mine:\n  base_path: [\n")


@fault("AV-1703", kind="cpu")
def extra_paths_of_another_form(host):
    host.write("comfyui/extra_model_paths.yaml", "- a list\n")


@fault("AV-1704", kind="cpu")
def extra_paths_to_a_folder_that_is_gone(host):
    host.write("comfyui/extra_model_paths.yaml", "mine:\n  base_path: /gone\n  vae: vae\n  controlnet: gone\n")


@fault("AV-1705", WARNING, kind="cpu")
def no_models(host):
    host.model.unlink()


@fault("AV-1302", kind="cpu")
def a_truncated_model(host):
    os.truncate(host.model, host.model.stat().st_size - 1)


@fault("AV-1302", kind="cpu")
def an_empty_model(host):
    os.truncate(host.model, 0)


@fault("AV-1302", kind="cpu")
def a_model_without_a_header(host):
    host.model.write_bytes(b"{}" * 100)


@fault("AV-1306", kind="cpu")
def a_pipe_in_place_of_a_model(host):
    os.mkfifo(host.model.with_name("pipe.safetensors"))


@fault("AV-1703", kind="cpu")
def extra_paths_that_nest_deeply(host):
    host.write("comfyui/extra_model_paths.yaml", "a: " + "[" * 1000)


@fault("AV-1304", kind="cpu")
def a_web_page_in_place_of_a_model(host):
    host.model.write_bytes(b"<!DOCTYPE html><html>Sign in</html>")


@fault("AV-1302", kind="cpu")
def a_model_in_an_extra_folder_that_is_truncated(host):
    path = host.safetensors(host.root / "more" / "wan" / "deep" / "lora.safetensors")
    os.truncate(path, 20)
    host.write("comfyui/extra_model_paths.yaml", "mine:\n  base_path: ../more\n  loras: |\n    wan\n")


@fault("AV-1302", WARNING, kind="cpu")
def an_unfinished_download(host):
    host.write("comfyui/models/vae/vae.safetensors.aria2", "")


@fault("AV-1302", WARNING, kind="cpu")
def an_unfinished_download_of_a_hub(host):
    host.write("comfyui/models/vae/.cache/huggingface/download/vae.0a1b.incomplete", "")


@fault("AV-1303", kind="cpu")
def a_pointer_of_git_lfs(host):
    host.model.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")


@fault("AV-1314", kind="cpu")
def a_link_to_a_model_that_is_gone(host):
    (host.model.parent / "gone.safetensors").symlink_to("/nowhere/gone.safetensors")


# Disks


@fault("AV-1316", kind="cpu")
def a_full_disk(host):
    host.space = Space(500 * GB, GB // 2)


@fault("AV-1316", WARNING, kind="cpu")
def a_nearly_full_disk(host):
    host.space = Space(500 * GB, 3 * GB)


@fault("AV-1112", WARNING, kind="cpu")
def a_slow_disk(host):
    host.safetensors(host.model, 200 * 2**20)
    host.seconds = 0.02  # for each MB that is read, and so 50 MB/s


# Clusters


@fault("AV-1901", kind="cpu")
def a_cluster_whose_file_is_broken(host):
    host.cluster().with_suffix(".json").write_text('{"listen": "192.168.10.1:29600", "port": 1}')


@fault("AV-1902", kind="cpu")
def a_key_that_others_can_read(host):
    host.cluster().chmod(0o644)


@fault("AV-1902", kind="cpu")
def a_key_that_is_gone(host):
    host.cluster().unlink()


@fault("AV-1908", kind="cpu")
def an_address_of_another_host(host):
    host.cluster()
    host.fails_to_bind = errno.EADDRNOTAVAIL


@fault("AV-1908", WARNING, kind="cpu")
def an_address_that_is_in_use(host):
    host.cluster()
    host.fails_to_bind = errno.EADDRINUSE


@fault("AV-1908", WARNING, kind="cpu")
def a_name_that_leads_to_this_host_only(host):
    host.cluster("atlas1:29600")
    host.leads_to = "127.0.1.1"


@fault("AV-1908", WARNING, kind="cpu")
def an_address_that_is_every_interface(host):
    host.cluster("0.0.0.0:29600")


@fault("AV-1908", WARNING, kind="cpu")
def an_address_of_the_public_internet(host):
    host.cluster("[2606:4700::1]:29600")


def test_a_cluster_without_faults_is_fine_and_an_address_is_taken_for_a_moment_only(tmp_path, monkeypatch):
    host = PlayedHost(tmp_path, "cpu")
    host.cluster()
    assert host.examine(monkeypatch) == []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError) as caught:
            surroundings.bind(*taken.getsockname())
        assert caught.value.errno == errno.EADDRINUSE
        address = taken.getsockname()
    for _ in range(2):
        surroundings.bind(*address)


def test_there_are_enough_faults():
    codes = {parameters.values[1] for parameters in FAULTS}
    own = {code for code in CODES if code[3:5] in ("10", "11", "17")} - {"AV-1004", "AV-1005"}  # of a job only
    assert len(FAULTS) >= 50 and own <= codes, own - codes


# What is read is untrusted


HOSTILE = "\x1b[2J\x1b]0;gone\x07 \u202ereversed\udc80 'quoted' \\ \"x\"\n| 0 | fake"


def test_hostile_names_and_output_are_escaped(tmp_path, monkeypatch):
    host = PlayedHost(tmp_path, "npu")
    said = HOSTILE.encode(errors="replace").decode().replace("'", "")
    host.script("npu-smi", f"printf '%s' '{said}' >&2; exit 1")
    host.write(os.fsdecode(os.fsencode("comfyui/models/vae/\x1b[31m\n\u202e")) + ".safetensors", "short")
    host.package("transformers", "4.1.0\x1b[2J")
    with host.played(monkeypatch):
        groups = command.examine(host.around())
    out = io.StringIO()
    table.print_table("npu", groups, out)
    found = {finding.code for findings in groups.values() for finding in findings if finding.code}
    assert found == {"AV-1012", "AV-1302", "AV-1015"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\ud800-\udfff]", out.getvalue())
    written = table.groups_as_json("npu", groups)
    assert written.isascii() and json.loads(written)["counts"][ERROR] == 3


@pytest.mark.parametrize("text", [
    "", "|", "| 1 910B | OK |\n" * 3, "| 0 x | OK | 1 |\n| 0 | 0000:01:00.0 | 1 |", HOSTILE,
])  # fmt: skip
def test_output_of_npu_smi_that_is_not_understood_lists_no_card(text):
    assert cards.parsed(text) == []


# Lines of npu-smi as they are printed in public reports: of 22.0 with a 310P, 23.3 and 24.1 with A2, 24.1 with A3.
PRINTED = [
    ("""
| NPU     Name      | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device    | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
| 0       310P3     | OK              | 16.2         42                0    / 0              |
| 0       0         | 0000:86:00.0    | 0            994  / 21534                            |""",
     [("NPU 0 chip 0 (310P3)", "OK", 994, 21534, {})]),
    ("""
| 0       910B3              | OK            | 67.5         42                0    / 0               |
| 0       NA                 | 0000:C1:00.0  | 60           5042  / 65536                            |""",
     [("NPU 0 chip 0 (910B3)", "OK", 5042, 65536, {})]),
    ("""
| 2     910B2C              | Warning       | 87.8        31                0    / 0             |
| 0                         | 0000:52:00.0  | 0           0    / 0          3406 / 65536         |
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 2       0                 | 1333928       |                          | 37709                   |
| No running processes found in NPU 3                                                            |""",
     [("NPU 2 chip 0 (910B2C)", "Warning", 3406, 65536, {1333928: ("", 37709)})]),
    ("""
| 0     Ascend910           | OK            | 178.9       36                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3412 / 65536         |
| 0     Ascend910           | OK            | -           36                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          41697/ 65536         |
| 0       0                 | 3325989       |                          | 50128                   |
| 0       1                 | 3328327       |                          | 50119                   |""",
     [("NPU 0 chip 0 (Ascend910)", "OK", 3412, 65536, {3325989: ("", 50128)}),
      ("NPU 0 chip 1 (Ascend910)", "OK", 41697, 65536, {3328327: ("", 50119)})]),
]  # fmt: skip


@pytest.mark.parametrize("text, states", PRINTED, ids=["310P", "A2 of 23.3", "A2", "A3"])
def test_what_npu_smi_prints_is_understood(text, states):
    assert cards.parsed(text) == [cards.CardState(*state) for state in states]


def test_a_tool_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "TOOL_SECONDS", 0.2)
    host = PlayedHost(tmp_path, "npu")
    host.script("npu-smi", "while :; do :; done")
    (found,) = host.examine(monkeypatch)
    assert found.code == "AV-1012" and "did not answer within 0.2 s" in found.found


def test_large_output_of_a_tool_is_cut(tmp_path):
    host = PlayedHost(tmp_path, "cpu")
    assert len(host.around().output_of(sys.executable, "-c", f"print('x' * {2 * MOST_OUTPUT})")) == MOST_OUTPUT


def test_folders_of_models_that_link_to_each_other_are_read_once(tmp_path):
    host = PlayedHost(tmp_path, "cpu")
    (host.model.parent / "up").symlink_to(host.comfyui / "models")
    assert list(model_files.model_files_in(host.around(), [host.model.parent, host.model.parent]).files) == [host.model]


def test_of_many_faulty_model_files_some_are_named_and_the_others_counted(tmp_path):
    host = PlayedHost(tmp_path, "cpu")
    for number in range(20):
        host.model.with_name(f"gone {number}.safetensors").symlink_to(tmp_path / "nowhere")
        host.model.with_name(f"empty {number}.safetensors").write_bytes(b"")
    faults = [finding for finding in model_files._files(host.around()) if finding.level == ERROR]
    gone, empty = ([one.found for one in faults if one.code == code] for code in ("AV-1314", "AV-1302"))
    assert len(gone) == 8 and "(as 12 others)" in gone[-1] and not any("others" in found for found in gone[:-1])
    assert len(empty) == 8 and re.search(r"(12|13) other files were not looked at", empty[-1])


def test_a_search_of_models_ends_in_time(tmp_path):
    host = PlayedHost(tmp_path, "cpu")
    host.seconds = 2.0
    for number in range(5):
        host.safetensors(host.model.with_name(f"{number}.safetensors"))
    found = model_files.model_files_in(host.around(), [host.model.parent])
    assert not found.complete and len(found.files) <= 2


# The table


def groups_of(*levels):
    words = "several words that take more than one line on a narrow terminal, as /a/path/without/any/space/" + "x" * 90
    return {"Group": [Finding(f"check {level}", level, words, *(() if level == OK else ("AV-1001", words)))
                      for level in levels]}  # fmt: skip


@pytest.mark.parametrize("width", [20, 60, 80, 100, 300])
def test_the_table_fits_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    table.print_table("cpu", groups_of(*FINDING_LEVELS), out)
    assert max(len(line) for line in out.getvalue().splitlines()) <= max(width, table.NARROWEST)
    for words in ("AV-1001: several words", "-> several words", "1 error, 1 warning, 1 OK; docs/errors.md"):
        assert words in re.sub(r"\s+", " ", out.getvalue())


def test_colours_are_only_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    plain, coloured = io.StringIO(), Terminal()
    for out in (plain, coloured):
        table.print_table("cpu", groups_of(*FINDING_LEVELS), out)
    assert "\x1b" not in plain.getvalue() and "\x1b[31merror" in coloured.getvalue()
    assert re.sub(r"\x1b\[\d+m", "", coloured.getvalue()) == plain.getvalue()


# The command, on this machine


def doctor(*arguments, python=(sys.executable,), **variables):
    run = [*python, "-m", "ascend_runtime", "doctor", *arguments]
    environ = {name: value for name, value in os.environ.items() if name != "COMFYUI_DIR"} | variables
    return subprocess.run(run, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_on_this_machine(tmp_path):
    PlayedHost(tmp_path, "cpu")
    done = doctor("--json", "--device", "cpu", "--models", str(tmp_path / "comfyui" / "models"))
    said = json.loads(done.stdout)
    assert list(said) == ["format", "device", "level", "counts", "findings"] and said["device"] == "cpu"
    assert done.returncode == (said["level"] == ERROR) and done.stderr == ""
    by_name = {finding["check"]: finding for finding in said["findings"]}
    assert by_name["model files"]["level"] == by_name["packages"]["level"] == OK
    assert by_name["imports"]["level"] in (OK, WARNING)  # a warning if the machine is too busy to import in time
    assert all(list(finding) == ["group", "check", "level", "code", "found", "cure"] for finding in said["findings"])


def test_the_command_finds_that_nothing_is_installed():
    """It needs none of the pack's requirements itself."""
    done = doctor("--device", "npu", python=(sys.executable, "-S"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = re.sub(r"\s+", " ", done.stdout)
    assert "torch is not installed in this Python" in said and re.search("Not installed: .*msgspec.*tqdm", said)
    assert {"AV-1001", "AV-1002", "AV-1006", "AV-1015"} <= set(re.findall(r"AV-\d{4}", said))


@pytest.mark.parametrize("arguments", [["--models", "/nowhere"], ["--device", "tpu"], ["--models"], ["file"]])
def test_a_bad_argument(arguments):
    done = doctor(*arguments)
    assert done.returncode == 2 and "error: " in done.stderr and done.stdout == ""


def test_a_package_that_is_really_broken_is_named(tmp_path, monkeypatch):
    """By a real Python, which imports what the played host has."""
    host = PlayedHost(tmp_path, "cpu")
    for name in {*PACKAGES} - {"tqdm", "msgspec", "pillow", "websocket-client"}:
        host.remove_package(name)
    host.write("broken/tqdm.py", "raise ImportError('a broken\\x1b[2J tqdm')")
    host.environ["PYTHONPATH"] = str(tmp_path / "broken")
    around = replace(host.around(), python=sys.executable)
    with host.played(monkeypatch):
        (found,) = packages.Imports(around).findings(around)
    assert found.code == "AV-1016" and found.found == "tqdm cannot be imported (ImportError: a broken\x1b[2J tqdm)."


@pytest.mark.parametrize("device, expected", [("auto", "cpu"), ("npu", "npu"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_the_devices_that_are_checked(tmp_path, monkeypatch, device, expected):
    host = PlayedHost(tmp_path, "cpu")
    with host.played(monkeypatch):
        assert kind_of(device, host.environ, host.root) == expected


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_auto_finds_cards_by_any_sign_of_them(tmp_path, monkeypatch, kind):
    host = PlayedHost(tmp_path, kind)
    with host.played(monkeypatch):
        assert kind_of("auto", host.environ, host.root) == kind


CLIENT = """
import sys, time
from ascend_runtime import ParallelSpec, Runtime
runtime = Runtime(ParallelSpec(ranks=1), device="cpu", environment={environment!r})
runtime.start()
print("ready", flush=True)
time.sleep(600)
"""
# A process that a rank starts has its command line, and does not end with it.
FORKS = """
import os, sys, time
if "ascend_runtime.engine.worker" in sys.orig_argv and os.fork() == 0:
    os.setsid()
    for descriptor in range(64):
        try:
            os.close(descriptor)
        except OSError:
            pass
    time.sleep(600)
    os._exit(0)
"""


def left_among(pids):
    """Those of these processes that an error of the check of ranks names, on this machine."""
    named = " ".join(finding.found for finding in processes._left_ranks(Surroundings("cpu")) if finding.level == ERROR)
    return {pid for pid in pids if f"Process {pid} " in named}


def test_a_real_rank_is_in_use_until_its_client_is_killed(tmp_path, marked):
    environ, _ = marked
    (tmp_path / "sitecustomize.py").write_text(FORKS)
    code = CLIENT.format(environment={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environ},
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    variable, value = next(iter(environ.items()))

    def workers() -> set[int]:
        return {int(folder.name) for folder in Path("/proc").glob("[0-9]*")
                if f"{variable}={value}" in processes._read(Surroundings("cpu"), int(folder.name), "environ")
                and processes._is_rank(Surroundings("cpu"), int(folder.name))}  # fmt: skip

    try:
        assert client.stdout.readline() == "ready\n"
        worker_pids = workers()
        assert len(worker_pids) == 2 and left_among(worker_pids) == set()
        assert worker_pids <= processes.ranks_in_use(Surroundings("cpu"))
        client.kill()
        client.wait()
        deadline = time.monotonic() + 60
        while len(left := left_among(worker_pids)) != 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(left) == 1  # the rank has died with its client, what it started has not
    finally:
        client.kill()
        client.wait()
        for pid in workers():  # also of a rank that did not start
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_folders_of_models_are_those_of_comfyui_and_its_extra_paths(tmp_path):
    host = PlayedHost(tmp_path, "cpu")
    for name in ("a/vae", "b/wan loras"):
        (tmp_path / name).mkdir(parents=True)
    host.write("comfyui/extra_model_paths.yaml",
               "one:\n  base_path: ../a\n  is_default: true\n  vae: vae\n\n"
               f"two:\n  loras: |\n    {tmp_path}/b/wan loras\nnone:\n")  # fmt: skip
    folders, faults = comfyui.model_folders(host.around())
    named = [str(folder.resolve().relative_to(tmp_path)) for folder in folders]
    assert faults == [] and named == ["comfyui/models/vae", "a/vae", "b/wan loras"]
