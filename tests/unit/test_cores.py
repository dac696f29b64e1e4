"""Whose cores ranks compute on: those that a container's quota leaves, as many threads as the user asks for."""

import os
import platform
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from ascend_runtime.hardware import cores
from ascend_runtime.client.group import RankGroup

ROOT = Path(__file__).resolve().parents[2]
BOUND = len(os.sched_getaffinity(0))
V1, V2 = "cgroup cgroup rw,cpu,cpuacct", "cgroup2 cgroup rw,nsdelegate"


@pytest.fixture
def process(tmp_path, monkeypatch):
    """`process(group, mount, root, **quotas)`: a fake /proc/self of a process on 16 cores in `group` of a hierarchy,
    whose group `root` is mounted; quotas: what a group of it (named by its path, _ for /) has in its files."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))

    def process(group, mount, root="/", **quotas):
        proc, point = tmp_path / "proc", tmp_path / "cgroup"
        for folder in (proc, point):
            folder.mkdir()
        line = f"0::{group}" if mount == V2 else f"4:cpuset:/elsewhere\n3:cpu,cpuacct:{group}\n0::/"
        (proc / "cgroup").write_text(f"{line}\n")
        (proc / "mountinfo").write_text(f"20 1 0:1 / /proc rw shared:1 - proc proc rw\n"
                                        f"30 25 0:28 {root} {point} rw,nosuid shared:9 - {mount}\n")  # fmt: skip
        for name, (quota, period) in quotas.items():
            folder = point / name.replace("_", "/").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            if mount == V2:
                (folder / "cpu.max").write_text(f"{quota} {period}\n")
            else:
                (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
                (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
        return proc

    return process


@pytest.mark.parametrize("mount, none", [(V1, -1), (V2, "max")])
@pytest.mark.parametrize("quota, expected", [(400_000, 4), (350_000, 3), (50_000, 1), (9_000_000, 16), (None, 16)])
def test_a_containers_quota_bounds_the_cores(process, mount, none, quota, expected):
    assert cores.usable_cores(process("/", mount, _=(quota or none, 100_000))) == expected


@pytest.mark.parametrize("mount, none", [(V1, -1), (V2, "max")])
def test_the_tightest_group_above_counts(process, mount, none):
    quotas = {"a": (300_000, 100_000), "a_b": (none, 100_000), "a_b_c": (1_000_000, 100_000), "x": (100, 100_000)}
    assert cores.usable_cores(process("/a/b/c", mount, **quotas)) == 3


@pytest.mark.parametrize("group, root", [("/docker/1", "/docker/1"), ("/docker/1/in", "/docker/1"), ("/../2", "/"),
                                         ("/other", "/docker/1")])  # fmt: skip
def test_a_container_that_sees_only_its_own_group(process, group, root):
    assert cores.usable_cores(process(group, V1, root, _=(200_000, 100_000))) == 2


@pytest.mark.parametrize("text", ["", "max", "nonsense 100000", "100000 0"])
def test_a_file_without_a_quota(process, tmp_path, text):
    proc = process("/", V2)
    (tmp_path / "cgroup" / "cpu.max").write_text(text)
    assert cores.usable_cores(proc) == 16


def test_without_proc(tmp_path):
    assert cores.usable_cores(tmp_path) == BOUND


@pytest.fixture
def real_group():
    """A real control group of half a core, where this process may make one (in a container mostly not)."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    point, file, quota = (v1, "cpu.cfs_quota_us", "50000") if v1.is_dir() else (v2, "cpu.max", "50000 100000")
    group = point / f"ascend_test_{uuid.uuid4().hex}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error})")
    try:
        if not (group / file).exists():
            pytest.skip("the cpu controller is not given to new groups here")
        (group / file).write_text(quota)
        yield group
    finally:
        group.rmdir()


def test_a_real_group(real_group):
    code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); " \
           "from ascend_runtime.hardware import cores; " \
           "print(cores.usable_cores(), *cores._quotas(cores.PROCESS))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(real_group / "cgroup.procs")], cwd=ROOT, text=True,
                          capture_output=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    usable, *quotas = map(float, done.stdout.split())
    assert usable == 1 and 0.5 in quotas


# What they compute

X86 = "flags\t\t: fpu sse4_2 avx2 avx512f avx512bw avx512vl {}\nbogomips\t: 5000\n"
KUNPENG_920 = "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm fcma {}\n"


@pytest.mark.parametrize("text, computes", [
    (X86.format("") * 4, False), (X86.format("avx512_bf16") * 4, True), (X86.format("amx_bf16 amx_tile") * 4, True),
    (KUNPENG_920.format("asimddp asimdfhm") * 4, False), (KUNPENG_920.format("svebf16 i8mm bf16") * 4, True),
    (KUNPENG_920.format("svebf16") * 4, False),  # of vectors, which torch does not ask for
    (X86.format("avx512_bf16") + X86.format(""), False), ("", False), ("processor : 0\nmodel name : bf16\n", False),
])  # fmt: skip
def test_whether_the_cores_compute_bfloat16(tmp_path, text, computes):
    (tmp_path / "cpuinfo").write_text(text)
    assert cores.compute_bfloat16(tmp_path / "cpuinfo") == computes


def test_without_cpuinfo_they_do_not(tmp_path):
    assert not cores.compute_bfloat16(tmp_path / "cpuinfo")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch knows this only of x86")
def test_this_cpu_computes_bfloat16_if_torch_says_so():
    assert cores.compute_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# Threads


@pytest.mark.parametrize("ranks, environ, threads", [
    (1, {}, "8"), (2, {"OMP_NUM_THREADS": ""}, "4"), (3, {}, "2"), (16, {}, "1"),
    (2, {"OMP_NUM_THREADS": "3"}, "3"), (2, {"OMP_NUM_THREADS": "4,2"}, "4,2"),
])  # fmt: skip
def test_threads_are_the_users_or_an_equal_part(ranks, environ, threads, monkeypatch):
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    chosen = cores.thread_variables(ranks, environ)
    assert chosen["OMP_NUM_THREADS"] == threads
    assert chosen.get("ASCEND_RUNTIME_ALL_THREADS") == (None if environ.get("OMP_NUM_THREADS") else "8")


@pytest.mark.parametrize("asked", ["0", "-1", "many", "2,", "1.5"])
def test_a_number_of_threads_that_is_none(asked):
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS is '{asked}'; it can be the number of threads"):
        cores.thread_variables(2, {"OMP_NUM_THREADS": asked})


@pytest.mark.parametrize("theirs, own, threads", [
    ("3", {}, "3"), ("3", {"OMP_NUM_THREADS": "5"}, "5"), ("3", {"OMP_NUM_THREADS": ""}, "4"), ("", {}, "4"),
])  # fmt: skip
def test_what_a_rank_is_started_with(monkeypatch, theirs, own, threads):
    """Ranks that are started with it are in tests/unit/test_environment.py."""
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", theirs)
    with socket.create_server(("127.0.0.1", 0)) as rendezvous:
        environment = RankGroup(2, "cpu", own)._rank_environment(0, 99, rendezvous)
    assert environment["OMP_NUM_THREADS"] == threads
