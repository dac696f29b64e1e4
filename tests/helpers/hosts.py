"""Network namespaces as hosts: each has its own interface, address, host name and abstract sockets; files and the
kernel are shared. They are joined by a switch, a namespace with a bridge.

Namespaces have no names: they exist as long as this process holds them open, or a process is in them. The kernel kills
what was started in them when this process dies, so nothing remains, however it ends.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000  # linux/sched.h
TOOLS = ("ip", "tc", "nft", "nsenter", "unshare", "setpriv", "mount")
NETWORK = "10.77.0"
ROOT = Path(__file__).resolve().parents[2]
END = 10.0  # seconds for killed processes to be gone
# Names resolve on hosts, and /sys shows the interfaces of the namespace that a process is in.
INSIDE = """
set -e
hostname "$1"
mount -t tmpfs none /mnt
printf %s "$2" > /mnt/hosts
mount --bind /mnt/hosts /etc/hosts
umount -l /mnt
mount -t sysfs none /sys
shift 2
exec "$@"
"""
_libc = ctypes.CDLL(None, use_errno=True)


def require():
    """Skips the test, or fails it in CI, where hosts cannot be made."""
    import pytest

    if (reason := lacking()) is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"hosts cannot be made: {reason}")


def lacking():
    """Why hosts cannot be made here, or None."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} missing (Debian and Ubuntu: apt-get install iproute2 nftables)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        os.close(_new_namespace())
    except OSError as error:
        return f"no network namespace: {error}"
    return None


def _new_namespace():
    """A descriptor of a new network namespace."""
    made = []

    def make():
        try:
            _call("unshare", CLONE_NEWNET)
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)  # which leaves this process's namespace, and ends
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def _call(name, *arguments):
    if getattr(_libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


class Namespace:
    """A network namespace, of a host or of the switch."""

    def __init__(self):
        self.descriptor = _new_namespace()
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        self.inode = os.fstat(self.descriptor).st_ino

    def tool(self, *command, given=None):
        """Runs a command in this namespace, and returns what it prints."""
        entered = ["nsenter", f"--net={self.path}", *command]
        ran = subprocess.run(entered, input=given, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, f"{' '.join(command)}: {ran.stderr}"
        return ran.stdout

    @contextmanager
    def entered(self):
        """The calling thread is in this namespace meanwhile, with the sockets, threads and processes that it makes."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _call("setns", self.descriptor, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", own, CLONE_NEWNET)
            os.close(own)

    @property
    def pids(self):
        """The processes in this namespace, but for this one."""
        own = os.getpid()
        return [pid for pid, inode in _processes() if inode == self.inode and pid != own]


def _processes():
    """(process id, inode of its network namespace)"""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            yield int(process.name), (process / "ns" / "net").stat().st_ino
        except OSError:
            pass  # it ended meanwhile


class Host(Namespace):
    """A host by name, with an address in the network of all."""

    def __init__(self, number, hosts):
        super().__init__()
        self.name, self.address = f"host{number}", f"{NETWORK}.{number}"
        self._port, self._hosts = f"port{number}", hosts

    def start(self, command, **options):
        """Starts a command on this host, as subprocess.Popen does. The kernel kills it with the calling thread."""
        process = subprocess.Popen([*self.prefix, *map(str, command)], **options)
        self._hosts.started.append(process)
        return process

    @property
    def prefix(self):
        """Words that make a command one of this host, which ends with the thread that starts it."""
        namespaces = ["nsenter", f"--net={self.path}", "unshare", "--mount", "--uts"]
        return ["setpriv", "--pdeathsig", "KILL", *namespaces, "sh", "-c", INSIDE, "sh", self.name, self._hosts.names]

    def kill(self):
        """Ends all processes of this host at once, as when it loses power, but for the silence on its links."""
        end([self])

    # Links

    def cut(self):
        """Pulls the cable: what is sent gets lost, and nobody notices."""
        self._hosts.switch.tool("ip", "link", "set", self._port, "nomaster")

    def mend(self):
        self._hosts.switch.tool("ip", "link", "set", self._port, "master", "switch")

    def limit(self, rate):
        """The rate of this host's link in both directions, such as "1gbit"."""
        shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
        self.tool("tc", "qdisc", "replace", "dev", "eth0", *shape)
        self._hosts.switch.tool("tc", "qdisc", "replace", "dev", self._port, *shape)

    def lose(self, percent):
        """Drops so many of 100 packets that come to this host; 0 ends it."""
        rules = ["table inet loss", "delete table inet loss"]
        if percent:
            rules += [
                "add table inet loss",
                "add chain inet loss coming { type filter hook input priority 0; }",
                f"add rule inet loss coming iif eth0 numgen random mod 100 < {percent} counter drop",
            ]
        self.tool("nft", "-f", "-", given="\n".join([*rules, ""]))

    @property
    def lost(self):
        """The number of packets dropped by `lose`."""
        return int(re.search(r"counter packets (\d+)", self.tool("nft", "list", "table", "inet", "loss"))[1])

    def passed(self, interface="eth0"):
        """The bytes that have come to an interface of this host, and those that it has sent, with their headers."""
        found = json.loads(self.tool("ip", "-j", "-s", "link", "show", interface))[0]["stats64"]
        return found["rx"]["bytes"], found["tx"]["bytes"]

    def slow_link(self, port, to, delay=0.0, record=None):
        """A process on this host that passes TCP connections at `port` on to HOST:PORT.

        delay: in seconds, each way. record: a folder, where each direction of each connection gets a file.
        """
        script = ROOT / "tests" / "helpers" / "slow_link.py"
        command = [sys.executable, "-I", script, self.address, port, to, delay, *([record] if record else [])]
        process = self.start(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "listening\n"
        return process


class Hosts(list):
    """Hosts that reach each other: a context manager. hosts[0] is host1 at 10.77.0.1."""

    def __init__(self, number):
        super().__init__()
        self.names = "127.0.0.1 localhost\n"
        self.started = []  # processes
        self.switch = Namespace()
        try:
            self.switch.tool("ip", "-batch", "-", given="link add switch type bridge\nlink set switch up\n")
            for _ in range(number):
                self._add(len(self) + 1)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _add(self, number):
        host, port = Host(number, self), f"port{number}"
        self.append(host)
        self.names += f"{host.address} {host.name}\n"
        self.switch.tool("ip", "-batch", "-", given=(
            f"link add {port} type veth peer name eth0 netns {host.path}\n"
            f"link set {port} master switch up\n"
        ))  # fmt: skip
        host.tool("ip", "-batch", "-", given=(
            f"addr add {host.address}/24 dev eth0\n"
            "link set eth0 up\n"
            "link set lo up\n"
        ))  # fmt: skip

    def close(self):
        """Ends what runs on the hosts, and removes them."""
        end(self)
        for process in self.started:
            process.wait()
        for namespace in [*self, self.switch]:
            os.close(namespace.descriptor)
        self.clear()


def end(hosts):
    """Kills all processes on these hosts, and waits for their end."""
    since = time.monotonic()
    while pids := [pid for host in hosts for pid in host.pids]:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended meanwhile
        assert time.monotonic() - since < END, f"processes {pids} do not end"
        time.sleep(0.01)
