"""How ranks that torchrun starts find their environment, their relay and each other."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ascend_runtime.engine.machine import entering
from ascend_runtime.engine.machine.joining import agreed_name
from ascend_runtime.engine.machine.relay.regions import content_of, region_of
from ascend_runtime.engine.machine.relay.settings import pause_before_failing
from ascend_runtime.hardware import host, interfaces
from ascend_runtime.wire import messages
from ascend_runtime.wire.control import Wrote
from ascend_runtime.wire.envelopes import Leave
from ascend_runtime.wire.tls import make_key
from machines_client import MachinesClient

ROOT = Path(__file__).resolve().parents[2]
all_machines = pytest.mark.skipif("not config.getoption('--all-machines')", reason="--all-machines runs it")


# The environment


@pytest.fixture
def torchrun_variables(monkeypatch):
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in (*interfaces.SOCKET_INTERFACES, "MULTI_STREAM_MEMORY_REUSE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("first, threads", [({}, "4"), ({"OMP_NUM_THREADS": "1"}, "1")])
def test_the_number_of_threads_is_torchruns_only_if_the_user_set_it(torchrun_variables, monkeypatch, first, threads):
    monkeypatch.setattr(entering, "first_environment_of", lambda process: first)
    monkeypatch.setattr("ascend_runtime.hardware.cores.usable_cores", lambda: 8)
    assert entering.environment_of_rank("cpu", 1)["OMP_NUM_THREADS"] == threads


def test_the_first_environment_of_a_process_is_what_it_was_started_with(monkeypatch):
    monkeypatch.setenv("SET_LATER", "1")
    assert "SET_LATER" not in entering.first_environment_of(os.getpid())
    assert entering.first_environment_of(os.getpid())["PATH"] and entering.first_environment_of(2**22 + 1) == {}


def test_ranks_get_what_a_client_would_give_them(torchrun_variables, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    environment = entering.environment_of_rank("cpu", 1)
    assert environment["MALLOC_MMAP_MAX_"] == "0" and environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo" and environment["HCCL_SOCKET_IFNAME"] == "=lo"
    assert environment["NCCL_SOCKET_IFNAME"] == "ib0" and environment["RANK"] == "0"


def test_ranks_on_npus_can_always_shard_weights(torchrun_variables):
    assert entering.environment_of_rank("npu", 1)["MULTI_STREAM_MEMORY_REUSE"] == "2"


@pytest.fixture
def host_with_npus(monkeypatch, tmp_path):
    """Two cards and torch_npu, as far as the entering step looks."""
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    monkeypatch.setattr(host, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(host, "find_spec", lambda name: name == "torch_npu")
    monkeypatch.setattr(host, "problems", lambda environ: [])
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)


def test_a_rank_on_a_host_with_npus_enters_with_its_environment(torchrun_variables, host_with_npus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    entered, control = [], os.memfd_create("control")
    monkeypatch.setattr(entering, "die_with", lambda parent: None)
    monkeypatch.setattr(entering, "_connected", lambda options, kind, parent: control)
    monkeypatch.setattr(os, "execve", lambda *what: entered.append(what))
    entering.enter(["--client", "192.0.2.1:29600", "--key", "k", "--machine", "atlas1"])
    [(program, command, environment)] = entered
    assert program == sys.executable and command[-2:] == ["-m", "ascend_runtime.engine.worker"]
    assert os.get_inheritable(control)
    os.close(control)
    own = {"DEVICE": "npu", "CONTROL_FD": str(control), "PARENT": str(os.getppid()), "MACHINE": "atlas1"}
    assert own.items() <= {name.removeprefix("ASCEND_RUNTIME_"): text for name, text in environment.items()}.items()
    # All ranks see the same cards, and each takes that of its LOCAL_RANK.
    assert environment["LOCAL_RANK"] == "1" and environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1"
    assert environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1" and environment["HCCL_SOCKET_IFNAME"] == "=lo"
    assert environment["MULTI_STREAM_MEMORY_REUSE"] == "2" and "MALLOC_MMAP_MAX_" not in environment


def test_more_ranks_than_npus_are_refused(torchrun_variables, host_with_npus, monkeypatch):
    assert entering.kind_of_device("auto") == "npu"
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    with pytest.raises(ValueError, match="AV-1904.*--nproc-per-node is 2.*1 visible"):
        entering.kind_of_device("auto")


def test_an_interface_is_the_one_with_the_address_that_leads_to_the_first_machine():
    outer = [(name, entry.address) for name, entries in psutil.net_if_addrs().items() for entry in entries
             if entry.family == socket.AF_INET]  # fmt: skip
    for name, address in outer:
        assert interfaces.interface_with(ip_address(address)) == name
    assert interfaces.interface_with(ip_address("127.0.1.1")) == "lo"


def test_a_host_name_that_leads_to_the_host_itself_is_refused_with_several_machines(monkeypatch):
    monkeypatch.setattr(interfaces, "source_towards", lambda host: ip_address("127.0.1.1"))
    with pytest.raises(ValueError, match="AV-1912.*atlas1.*127.0.1.1.*--local-addr"):
        interfaces.interfaces_towards("atlas1", 2, {})
    assert interfaces.interfaces_towards("atlas1", 1, {})["GLOO_SOCKET_IFNAME"] == "lo"
    assert interfaces.interfaces_towards("localhost", 2, {})["GLOO_SOCKET_IFNAME"] == "lo"
    assert interfaces.interfaces_towards("atlas1", 2, dict.fromkeys(interfaces.SOCKET_INTERFACES, "eth7")) == {}


def test_a_host_that_cannot_be_reached_or_an_address_without_an_interface_is_named():
    with pytest.raises(ValueError, match="AV-1912.*no-such-host.invalid"):
        interfaces.source_towards("no-such-host.invalid")
    with pytest.raises(ValueError, match="AV-1912.*203.0.113.7"):
        interfaces.interface_with(ip_address("203.0.113.7"))


@pytest.mark.parametrize("options, said", [
    ([], "--client"), (["--client", "x", "--key", "k"], "HOST:PORT"),
    (["--client", "127.0.0.1:1", "--key", "k", "--wait", "-1"], "'-1' is not a number of seconds"),
    (["--client", "127.0.0.1:1", "--key", "k", "--wait", "long"], "'long' is not a number of seconds"),
    (["--client", "127.0.0.1", "--key", "k"], "--client is '127.0.0.1'; give HOST:PORT"),
    (["--client", "127.0.0.1:1", "--key", "k", "--machine", "a b"], "--machine"),
])  # fmt: skip
def test_wrong_options_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        entering.parser().parse_args(options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_worker_with_options_and_without_torchrun_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.setattr(entering, "die_with", lambda parent: None)
    for name in entering.OF_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as ended:
        entering.enter(["--client", "127.0.0.1:1", "--key", "k"])
    assert ended.value.code == 1 and "torchrun --nnodes" in capsys.readouterr().err


def test_a_relay_that_accepts_nobody_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(entering, "RELAY_DEADLINE", 0.3)
    name = f"\0ascend-video/test/{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as relay, socket.socket(socket.AF_UNIX) as other:
        relay.bind(name)
        relay.listen(0)
        other.connect(name)  # all that may wait there
        with pytest.raises(ValueError, match="AV-1911"):
            entering._connection(name, os.getppid())


def test_a_fault_that_stays_is_reported_ever_more_rarely():
    """torchrun starts ranks again at once, up to as many times as --max-restarts says."""
    assert [pause_before_failing(restart) for restart in (0, 1, 4, 5, 99)] == [0, 2, 16, 30, 30]


# Joining


@pytest.fixture
def stores():
    """`stores(n)`: n connections to one store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))

    def connected(count):
        return [dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False,
                              timeout=timedelta(seconds=20)) for _ in range(count)]  # fmt: skip

    return connected


def names_of(stores, ranks, delays=()):
    """What ranks agree on; each begins after its delay in seconds."""
    found = [None] * len(ranks)

    def join(place, rank, delay):
        time.sleep(delay)
        found[place] = agreed_name(stores[place], rank, len(ranks), 20)

    threads = [threading.Thread(target=join, args=(place, rank, delay))
               for place, (rank, delay) in enumerate(zip(ranks, delays or [0] * len(ranks)))]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_ranks_agree_on_a_name_that_earlier_ranks_did_not_have(stores):
    """The store of a torchrun that lives on still has what earlier ranks wrote."""
    first = names_of(stores(3), [0, 1, 2])
    second = names_of(stores(3), [0, 1, 2], [0, 0.1, 0.2])  # rank 0 sees the words of earlier ranks at first
    third = names_of(stores(3), [0, 1, 2], [0.2, 0.1, 0])  # others see the proposal of an earlier rank 0
    fewer = names_of(stores(2), [0, 1])
    one = names_of(stores(1), [0])
    more = names_of(stores(3), [0, 1, 2], [0.1, 0, 0])
    assert all(len(set(names)) == 1 and names[0] for names in (first, second, third, fewer, one, more))
    assert len({names[0] for names in (first, second, third, fewer, one, more)}) == 6


def test_a_rank_does_not_wait_for_ever_for_the_others(stores):
    for rank in range(2):
        with pytest.raises(TimeoutError, match="AV-1905"):
            agreed_name(stores(1)[0], rank, 3, 0.1)


# Results


@pytest.mark.parametrize("shape, where", [
    ((5, 6, 7, 3), (slice(1, 4), slice(0, 6), slice(0, 7), slice(0, 3))),  # whole frames
    ((5, 60, 70, 30), (slice(1, 4), slice(2, 40), slice(0, 70), slice(0, 30))),  # rows: long pieces
    ((5, 6, 7, 3), (slice(0, 5), slice(2, 5), slice(3, 7), slice(0, 3))),  # a tile: short ones
    ((1, 4, 3, 6, 7), (slice(0, 1), slice(0, 4), slice(1, 2), slice(2, 5), slice(3, 7))),  # of a latent
    ((8,), (slice(3, 5),)),
    ((1, 1), (slice(0, 1), slice(0, 1))),
])  # fmt: skip
def test_the_content_of_a_part_is_that_of_a_slice(shape, where):
    whole = torch.randn(shape)
    starts, sizes = tuple(side.start for side in where), tuple(side.stop - side.start for side in where)
    region = region_of(Wrote(job=1, lent=0, shape=shape, starts=starts, sizes=sizes, itemsize=4))
    content = b"".join(content_of(region, memoryview(whole.numpy()).cast("B")))
    assert content == whole[where].contiguous().numpy().tobytes()


@pytest.mark.parametrize("starts, sizes", [((0,), (1,)), ((-1, 0), (1, 1)), ((0, 3), (1, 2)), ((0, 0), (0, 1))])
def test_a_part_outside_of_its_tensor_is_refused(starts, sizes):
    with pytest.raises(ValueError, match="not in a tensor"):
        region_of(Wrote(job=1, lent=0, shape=(2, 4), starts=starts, sizes=sizes, itemsize=4))


# torchrun


@pytest.fixture
def torchrun(tmp_path):
    """`torchrun(client, ranks, ...)`: its process, on one of several machines if that is given; killed afterwards."""
    started = []

    def start(client, ranks, machine="atlas1", nodes=1, **options):
        given = {"client": client.address, "key": client.key_file, "device": "cpu", "machine": machine, **options}
        log = tmp_path / f"{machine}.log"
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}",
            "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port}",
            "--local-addr=127.0.0.1", "-m", "ascend_runtime.engine.worker",
            *(f"--{name}={value}" for name, value in given.items()),
        ]  # fmt: skip
        with open(log, "ab") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        started.append(process)
        process.log = log
        return process

    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port = probe.getsockname()[1]
    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def client(tmp_path):
    make_key(tmp_path / "cluster.key", "cluster")
    with MachinesClient(tmp_path / "cluster.key") as client:
        yield client


def processes_of(torchrun):
    """A torchrun's ranks and relay."""
    return psutil.Process(torchrun.pid).children(recursive=True)


@all_machines  # tests/machines/ starts torchrun without it
def test_torchrun_starts_ranks_that_join_work_and_end(client, torchrun):
    started = torchrun(client, 2, wait=1)
    machine = client.accept()
    assert machine.ready([0, 1]) != {""}
    frames = messages.SharedTensor(os.memfd_create("frames"), torch.float32, (5, 4, 6, 3))
    ping = messages.encode(messages.Ping(job=1, reply=3, frames=frames))
    machine.say([0, 1], ping.body, job=1, lent=[frames.nbytes])
    answers = machine.answers([0, 1])
    assert {answer["type"] for answer in answers.values()} == {"Done"} and answers[0]["tensor"][2] == [3]
    assert torch.frombuffer(machine.lent[0], dtype=torch.float32).eq(1).all()
    below = processes_of(started)
    assert len(below) == 3
    machine.link.close()
    client.listener.close()
    assert started.wait(60) == 0 and "AV-1910" in started.log.read_text()  # no client came within a second
    assert not psutil.wait_procs(below, timeout=10)[1]


@all_machines
def test_torchrun_starts_ranks_again_that_were_lost(client, torchrun):
    started = torchrun(client, 2)
    groups = set()
    for end in ("leave", "kill first", "kill second", "kill relay"):
        machine = client.accept()
        [group] = machine.ready([0, 1])
        groups.add(group)
        if end == "leave":
            machine.link.post(Leave(reason="a test"))
            continue
        ranks = sorted(psutil.Process(started.pid).children(), key=lambda one: int(one.environ()["RANK"]))
        {"kill first": ranks[0], "kill second": ranks[1], "kill relay": ranks[0].children()[0]}[end].kill()
        if end == "kill second":
            machine.link.post(Leave(reason="a test"))
    assert len(groups) == 4


@all_machines
def test_two_torchruns_on_one_machine_have_a_relay_each(client, torchrun):
    one, two = (torchrun(client, 1, machine=name, nodes=2) for name in ("atlas1", "atlas2"))
    links = [client.accept(), client.accept()]
    assert sorted(link.hello.ranks for link in links) == [(0,), (1,)]
    assert {link.hello.machine for link in links} == {"atlas1", "atlas2"}
    groups = {link.hello.ranks: link.ready(link.hello.ranks) for link in links}
    assert groups[(0,)] == groups[(1,)]
    below = [*processes_of(one), *processes_of(two)]
    one.kill(), two.kill()
    assert not psutil.wait_procs(below, timeout=10)[1]  # nothing outlives its torchrun


# SLURM


def test_the_slurm_script_starts_torchrun_on_each_node_and_again_where_it_failed(tmp_path):
    """srun, scontrol and torchrun are played: a loop over two nodes, which writes what it would run."""
    played = {
        "scontrol": "echo node1; echo node2",
        "srun": 'shift 2; for id in 0 1; do SLURM_NODEID=$id SLURMD_NODENAME=node$((id + 1)) "$@" || exit; done',
        "torchrun": f'printf "%s|" "$@" >> {tmp_path}/run; echo >> {tmp_path}/run; [ $(wc -l < {tmp_path}/run) -ge 2 ]',
        "sleep": "",
        "ip": "echo 7: $6 inet $6.1/24 brd 10.0.0.255",
    }
    for name, text in played.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
                 "SLURM_JOB_ID": "77", "INTERFACE": "eth1"}  # fmt: skip
    script = ROOT / "scripts" / "ranks.slurm"
    command = ["bash", script, "--client", "192.0.2.1:29600", "--key", "/keys/a b.key"]
    subprocess.run(command, env=variables, check=True, timeout=30)
    first, again, second = (tmp_path / "run").read_text().splitlines()
    assert first == again and "|is_host=1|" in first and "|is_host=0|" in second
    assert "--machine|node1|--client|192.0.2.1:29600|--key|/keys/a b.key|" in first and "--machine|node2|" in second
    assert "--nnodes|2|--nproc-per-node|8|" in first and "--rdzv-endpoint|node1:29500|" in second
    assert "--rdzv-id|77|" in first and "|--local-addr|eth1.1|" in first
