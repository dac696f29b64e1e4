"""A rank that enters as torchrun's do, and then does what messages say, without torch: `python played_rank.py OPTIONS`.

Messages are dictionaries: {"type": "Play", "job": n, "do": ...} with "answer", "hang" (answers nothing, not even a
Cancel), "wait" (answers a Cancel), "fill" (fills its row of the lent memory [ranks, bytes] with its number + 1, then
answers), "flood" (reports half of each row of the lent memory several times, then answers).
"""

import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from ascend_runtime.engine.machine import entering
from ascend_runtime.wire.packets import ChannelClosed, Packets, header

ROOT = Path(__file__).resolve().parents[2]


class PlayedRank:
    def __init__(self, packets):
        self.packets, self.number = packets, int(os.environ["RANK"])

    def say(self, **message):
        body = msgspec.msgpack.encode(message)
        self.packets.post(header(body, 0, 0) + body, [])
        while self.packets.unsent:
            self.packets.wait(select.POLLOUT, None)
            self.packets.flush()

    def hear(self):
        """(message, packet)"""
        while (packet := self.packets.take()) is None:
            self.packets.wait(select.POLLIN, None)
        return msgspec.msgpack.decode(packet.body), packet

    def run(self):
        self.say(type="Ready", rank=self.number, group="played" + os.environ.get("PLAYED_GROUP", ""))
        while True:
            message, packet = self.hear()
            if message["type"] == "Shutdown":
                return 0
            if message["type"] == "Play":
                self.play(message, packet)
            packet.close()

    def play(self, message, packet):
        job, what = message["job"], message["do"]
        if what == "hang":
            time.sleep(600)
        if what == "wait":
            while self.hear()[0] != {"type": "Cancel", "job": job}:
                pass
            return self.say(type="Failed", job=job, kind="cancelled", error="", traceback="")
        block = packet.map_block()
        if what == "fill":
            self.fill(job, message["shape"], packet.descriptors[0])
        for _ in range(message.get("times", 0)):
            rows, columns = message["shape"]
            self.wrote(job, message["shape"], [0, 0], [rows, columns // 2])
        self.say(type="Done", job=job, got=bytes(block or b"")[:100])

    def fill(self, job, shape, descriptor):
        ranks, size = shape
        memory = mmap.mmap(descriptor, 0)
        memory[self.number * size : (self.number + 1) * size] = bytes([self.number + 1]) * size
        self.wrote(job, shape, [self.number, 0], [1, size])

    def wrote(self, job, shape, starts, sizes):
        self.say(type="Wrote", job=job, lent=0, shape=shape, starts=starts, sizes=sizes, itemsize=1)


def start(address, key, rank=0, ranks=1, first=0, world_size=None, restart=0, **options):
    """Starts a rank as torchrun would. rank: on its machine."""
    variables = {
        "RANK": first + rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size or ranks, "LOCAL_WORLD_SIZE": ranks,
        "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RESTART_COUNT": restart,
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    given = {"client": address, "key": key, "device": "cpu", **options}
    return subprocess.Popen(
        [sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items())],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def main():
    if sys.argv[1:]:
        entering.PROGRAM = [sys.executable, __file__]
        entering.enter(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = int(os.environ["ASCEND_RUNTIME_CONTROL_FD"])
    os.set_inheritable(control, False)
    try:
        sys.exit(PlayedRank(Packets(socket.socket(fileno=control))).run())
    except ChannelClosed:
        sys.exit(1)


if __name__ == "__main__":
    main()
