"""Large messages use their memory again, and never while anybody can still see it."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from ascend_runtime.wire.messages import Done
from ascend_runtime.wire.channel import Channel, SealedMessage, channel_pair
from ascend_runtime.wire.memory import blocks

LARGE = 3 << 18  # floats: 3 MiB


def deliver(value: float) -> torch.Tensor:
    """A large tensor of `value`, as it arrives at the other end of a connection."""
    ours, theirs = channel_pair()
    sender = threading.Thread(target=ours.send, args=(Done(job=1, tensor=torch.full((LARGE,), value)),))
    sender.start()
    received = Channel(theirs).receive().tensor
    sender.join()
    ours.close()
    theirs.close()
    return received


def block_of_next_message(floats: int = LARGE) -> int:
    """The inode of the memory that a message of this size goes out in."""
    ours, theirs = channel_pair()
    with SealedMessage(Done(job=1, tensor=torch.zeros(floats))) as sealed:
        ours.post(sealed)
    _, descriptors, _, _ = socket.recv_fds(theirs, 1 << 16, 8)
    inode = os.fstat(descriptors[0]).st_ino
    os.close(descriptors[0])
    ours.close()
    theirs.close()
    return inode


def test_memory_is_used_again_once_it_is_let_go():
    assert len({block_of_next_message() for _ in range(5)}) == 1
    held = deliver(1.0)
    busy = {block_of_next_message() for _ in range(5)}
    assert len(busy) == 1
    del held


def test_a_block_belongs_to_one_until_its_descriptors_are_closed():
    size = 12_345  # that no other test uses
    first, second = blocks.of(size), blocks.of(size)
    first.memory[:5] = b"first"
    second.memory[:5] = b"other"
    assert [os.pread(block.descriptor, 5, 0) for block in (first, second)] == [b"first", b"other"]
    with pytest.raises(OSError):
        os.pwrite(first.descriptor, b"by a receiver", 0)
    of_a_receiver = os.dup(first.descriptor)
    os.close(first.descriptor)
    third = blocks.of(size)
    assert third.memory is not first.memory
    os.close(of_a_receiver)
    os.close(second.descriptor)
    fourth = blocks.of(size)
    assert fourth.memory in (first.memory, second.memory)
    for block in (third, fourth):
        os.close(block.descriptor)


def test_what_is_held_never_changes():
    held = [deliver(float(value)) for value in range(5)]
    for value in range(5, 20):
        assert (deliver(float(value)) == value).all()
    assert all((tensor == value).all() for value, tensor in enumerate(held))
    view = held[3][100:200]
    del held
    for value in range(20, 30):
        deliver(float(value))
    assert (view == 3).all(), "a view holds the memory as well"


def test_a_receiver_cannot_write_to_the_sender():
    deliver(1.0).fill_(7.0)
    ours, theirs = channel_pair()
    with SealedMessage(Done(job=1, tensor=torch.zeros(LARGE))) as sealed:
        ours.post(sealed)
    received = Channel(theirs).receive().tensor
    assert not received.any()


def test_the_death_of_a_receiver_lets_go():
    ours, theirs = channel_pair()
    program = (
        "import socket, sys\n"
        "from ascend_runtime.wire.channel import Channel\n"
        "channel = Channel(socket.socket(fileno=int(sys.argv[1])))\n"
        "held = channel.receive().tensor\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    theirs.close()
    floats = LARGE + 1024  # a size that no other test uses
    with SealedMessage(Done(job=1, tensor=torch.zeros(floats))) as sealed:
        inode = os.fstat(sealed.descriptors[0]).st_ino
        ours.post(sealed)
    assert child.stdout.readline() == b"held\n"
    assert block_of_next_message(floats) != inode, "memory that another process holds was used again"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert block_of_next_message(floats) == inode
    ours.close()
