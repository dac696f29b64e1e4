"""The hosts that tests of several machines use: what they can do to a link, and that nothing of them remains."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
from rank_processes import seconds_until

HELPERS = Path(hosts.__file__).parent


@pytest.fixture(scope="module")
def two():
    hosts.require()
    with hosts.Hosts(2) as made:
        yield made


def pings(host, other, count=3):
    """How many of so many pings are answered."""
    command = ["ping", "-q", "-c", count, "-i", 0.02, "-W", 1, other]
    process = host.start(command, stdout=subprocess.PIPE, text=True)
    return int(process.communicate(timeout=60)[0].split(" received")[0].split()[-1])


def echo(host, port):
    """A server on a host: answers each byte with itself."""
    code = (f"import socket\nserver = socket.create_server(({host.address!r}, {port}))\nprint(flush=True)\n"
            "while True:\n  peer, _ = server.accept()\n  while data := peer.recv(65536): peer.sendall(data)\n"
            "  peer.close()\n")  # fmt: skip
    process = host.start([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "\n"
    return process


def holding(inode):
    """Whether any process is in this network namespace, or holds it open."""
    shown = f"net:[{inode}]"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [process / "ns" / "net", *(process / "fd").iterdir()]
            if any(os.readlink(link) == shown for link in links):
                return True
        except OSError:
            pass  # it ended meanwhile
    return False


def test_hosts_have_names_and_addresses_of_their_own(two):
    command = ["sh", "-c", "hostname; getent hosts host2; ls /sys/class/net"]
    said = two[0].start(command, stdout=subprocess.PIPE, text=True).communicate(timeout=60)[0].split()
    assert said[:3] == ["host1", "10.77.0.2", "host2"] and set(said[3:]) == {"eth0", "lo"}
    assert socket.gethostname() != "host1"


def test_a_link_is_cut_and_mended(two):
    assert pings(two[0], "host2") == 3
    two[1].cut()
    assert pings(two[0], "host2") == 0
    two[1].mend()
    seconds_until(lambda: pings(two[0], "host2") == 3, timeout=10)


def test_a_link_loses_packets(two):
    two[1].lose(50)
    answered = pings(two[0], "host2", 60)
    lost = two[1].lost
    two[1].lose(0)
    assert 10 < answered < 50 and 10 < lost < 50
    assert pings(two[0], "host2") == 3


def test_a_link_is_limited(two):
    server = echo(two[1], 7000)
    two[1].limit("80mbit")
    began = time.monotonic()
    with two[0].entered(), socket.create_connection((two[1].address, 7000)) as peer:
        peer.settimeout(20)
        for _ in range(40):  # a message and its echo at a time
            peer.sendall(bytes(100_000))
            received = 0
            while received < 100_000:
                received += len(peer.recv(2**20))
    seconds = time.monotonic() - began
    two[1].limit("40gbit")
    server.kill()
    server.wait()
    assert seconds > 0.25  # 0.8 s at this rate, less what the buckets of both ends hold


def test_a_slow_link_delays_each_way_and_records(two, tmp_path):
    server = echo(two[1], 7001)
    link = two[1].slow_link(7002, f"{two[1].address}:7001", delay=0.1, record=tmp_path)
    began = time.monotonic()
    with two[0].entered(), socket.create_connection((two[1].address, 7002)) as peer:
        peer.settimeout(20)
        peer.sendall(b"there and back")
        assert peer.recv(100) == b"there and back"
        assert 0.2 <= time.monotonic() - began < 2
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(100) == b""
    for process in (link, server):
        process.kill()
        process.wait()
        process.stdout.close()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "0-to": b"there and back", "0-from": b"there and back"
    }  # fmt: skip


def test_a_killed_host_has_no_processes(two):
    shell = two[1].start(["sh", "-c", "sleep 600 & sleep 600"])
    seconds_until(lambda: len(two[1].pids) == 3, timeout=10)
    others = list(two[0].pids)
    two[1].kill()
    assert not two[1].pids and two[0].pids == others
    shell.wait()


def test_nothing_remains_of_hosts(two):
    """Also after an exception."""
    with pytest.raises(ZeroDivisionError), hosts.Hosts(2) as made:
        inodes = [namespace.inode for namespace in [*made, made.switch]]
        started = [host.start(["sleep", "600"]) for host in made]
        seconds_until(lambda: all(host.pids for host in made), timeout=10)
        assert all(map(holding, inodes))
        1 / 0
    assert [process.wait() for process in started] == [-signal.SIGKILL] * 2
    assert not any(map(holding, inodes)) and not made


def test_nothing_remains_of_a_killed_process_hosts(two):
    code = """
import time, hosts
made = hosts.Hosts(2)
started = [host.start(["sleep", "600"]) for host in made]
link = made[0].slow_link(7000, "host2:7001")
print(*(namespace.inode for namespace in [*made, made.switch]), flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        inodes = list(map(int, process.stdout.readline().split()))
        assert len(inodes) == 3 and all(map(holding, inodes))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    seconds_until(lambda: not any(map(holding, inodes)), timeout=10)
