"""Envelopes and payloads reach the other side of a TLS link as they left, whatever the network does; nobody else can
read them, send any, or send them once more."""

import os
import random
import socket
import subprocess
import time
import tracemalloc

import msgspec
import pytest
import torch
from ascend_runtime.wire import envelopes, link, tls
from ascend_runtime.wire.channel import SealedMessage
from ascend_runtime.wire.envelopes import Deliver, FromRank, Gone, Hello, Here, Leave, Region, Rejected, Welcome
from ascend_runtime.wire.link import Link, LinkClosed
from ascend_runtime.wire.memory import blocks
from ascend_runtime.wire.messages import Encode, Ping
from ascend_runtime.wire.packets import Undecodable
from ascend_runtime.specs import TextEncoderSpec
from tls_links import DEADLINE, Recorder, connected, established, links, ready, taken

ENVELOPES = [
    Hello(pack="1.0", protocol=1, machine="atlas2", ranks=(8, 9), world_size=16, device="npu", packages={"torch": "2"}),
    Welcome(paths={"/models": "/mnt/models"}),
    Rejected(reason="谁都不认识", lasting=False),
    Here(rank=8),
    Gone(rank=9, by_kernel=True),
    Leave(reason="a machine was lost"),
    Deliver(ranks=(8, 9), job=3, body=5, block=70_000, lent=(1 << 40,)),
    FromRank(rank=8, body=7),
    Region(job=3, lent=0, shape=(9, 16, 16, 3), starts=(4, 0, 8, 0), sizes=(4, 16, 8, 3), itemsize=4),
]
PROMPT = "a lighthouse that nobody knows of"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "atlas.key"
    tls.make_key(path, "atlas")
    return path


@pytest.fixture(scope="module")
def key(key_file):
    return tls.read_key(key_file)


@pytest.fixture(autouse=True)
def nothing_is_left():
    blocks.forget()
    before = len(os.listdir("/proc/self/fd"))
    yield
    blocks.forget()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def pair(key):
    """(ours, theirs, received): two links, and the memory in which payloads have been received at ours."""
    received = []

    def place(envelope):
        received.append(bytearray(envelopes.payload_bytes(envelope)))
        return [memoryview(received[-1])]

    ours, theirs = links(key, place)
    yield ours, theirs, received
    ours.close()
    theirs.close()


def random_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def test_every_envelope_is_tried():
    assert {type(envelope) for envelope in ENVELOPES} == set(envelopes.Envelope.__subclasses__())


def test_envelopes_arrive_in_order_with_their_payloads(pair):
    ours, theirs, received = pair
    payloads = [random_bytes(envelopes.payload_bytes(envelope)) for envelope in ENVELOPES]
    for envelope, payload in zip(ENVELOPES, payloads):
        theirs.post(envelope, payload)
    assert [taken(ours, theirs) for _ in ENVELOPES] == ENVELOPES
    assert received == [payload for payload in payloads if payload]
    ours.post(Welcome())
    assert taken(theirs) == Welcome() and not theirs.unsent and not theirs.unsent_bytes


def test_a_part_of_a_result_is_received_where_it_belongs_without_a_copy(key):
    whole = torch.zeros(6, 1 << 20, dtype=torch.uint8)
    part = torch.randint(0, 256, (4, 1 << 19), dtype=torch.uint8)
    region = Region(job=1, lent=0, shape=(6, 1 << 20), starts=(1, 100), sizes=tuple(part.shape), itemsize=1)
    rows = [memoryview(row[100 : 100 + (1 << 19)].numpy()) for row in whole[1:5]]
    ours, theirs = links(key, lambda envelope: rows)
    tracemalloc.start()
    theirs.post(region, part.numpy())
    assert taken(ours, theirs) == region
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(whole[1:5, 100 : 100 + (1 << 19)], part) and whole.sum() == part.sum()
    assert peak < 100_000, "2 MiB were copied on the way"
    ours.close()
    theirs.close()


def test_a_sealed_message_goes_over_a_link_and_into_shared_memory(key):
    message = Ping(job=7, tensor=torch.randn(100_000), frames=None)
    places = []

    def place(envelope):
        places.extend([bytearray(envelope.body), blocks.of(envelope.block)])
        return [memoryview(places[0]), memoryview(places[1].memory)]

    ours, theirs = links(key, place)
    with SealedMessage(message) as sealed:
        assert not sealed.lent and len(sealed.block) >= message.tensor.nbytes
        theirs.post(Deliver(ranks=(0,), body=len(sealed.body), block=len(sealed.block)), sealed.body, sealed.block)
        taken(ours, theirs)
        assert bytes(places[0]) == sealed.body and places[1].memory[:] == sealed.block
        assert torch.equal(torch.frombuffer(places[1].memory, dtype=torch.float32)[:100_000], message.tensor)
    os.close(places[1].descriptor)
    ours.close()
    theirs.close()


def test_a_payload_that_nobody_wants_is_dropped(key):
    ours, theirs = links(key, lambda envelope: None)
    for size in (1, (1 << 18) - 1, 1 << 18, 3 * (1 << 18) + 5):
        theirs.post(FromRank(rank=1, body=size), random_bytes(size))
        assert taken(ours, theirs).body == size
    theirs.post(Here(rank=1))
    assert taken(ours) == Here(rank=1)
    ours.close()
    theirs.close()


def test_what_is_decrypted_already_is_not_forgotten(key):
    """Several envelopes in one TLS record: poll shows none but the first."""
    ours, theirs = established(*connected(), key)
    receiver = Link(ours, lambda envelope: None)
    theirs.send(b"".join(packed(Here(rank=number)) for number in range(5)))
    assert ready(receiver) and receiver.take() == Here(rank=0)
    assert not ready(receiver, timeout=0) and receiver.waiting
    assert [receiver.take().rank for _ in range(4)] == [1, 2, 3, 4]
    assert not receiver.waiting and receiver.take() is None
    receiver.close()
    theirs.close()


def packed(envelope) -> bytes:
    body = msgspec.msgpack.encode(envelope)
    return link._HEADER.pack(link._MAGIC, len(body)) + body


def test_envelopes_wait_for_a_receiver_that_does_not_read(key):
    ours, theirs = established(*connected(), key)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # most writes are partial
    received = []

    def place(envelope):
        received.append(bytearray(envelope.body))
        return [memoryview(received[-1])]

    receiver, sender = Link(ours, place), Link(theirs, place)
    rng = random.Random(5)
    sizes = [rng.choice((1, 100, 16_000, 16_384, 20_000, 300_000, 1_000_000)) for _ in range(30)]
    payloads = [random_bytes(size + number) for number, size in enumerate(sizes)]
    before = time.monotonic()
    for payload in payloads:
        sender.post(FromRank(rank=0, body=len(payload)), payload)
    assert time.monotonic() - before < 5 and sender.unsent
    assert sender.unsent_bytes > sum(map(len, payloads)) - 8_000_000
    sender.post(Here(rank=1))
    assert [taken(receiver, sender).body for _ in payloads] == [len(payload) for payload in payloads]
    assert taken(receiver, sender) == Here(rank=1) and received == payloads
    assert not sender.unsent and sender.unsent_bytes == 0
    receiver.close()
    sender.close()


def test_a_large_envelope_does_not_hold_up_others(pair):
    ours, theirs, _ = pair
    theirs.post(FromRank(rank=0, body=40 << 20), bytes(40 << 20))
    turns = 0
    while ours.take() is None:
        theirs.flush()
        turns += 1
    assert turns >= 9, "of 4 MiB each"


def test_the_end_of_the_other_side_is_a_loss_wherever_it_happens(key):
    """Also without TLS's own farewell, and inside of an envelope or a payload."""
    whole = packed(FromRank(rank=0, body=1000)) + bytes(1000)
    for size in (0, 3, 20, 500):
        ours, theirs = established(*connected(), key)
        receiver = Link(ours, lambda envelope: [memoryview(bytearray(1000))])
        if size:
            theirs.send(whole[:size])
        theirs.close()
        with pytest.raises(LinkClosed):
            taken(receiver)
        assert receiver.fileno() == -1
        receiver.flush()
        with pytest.raises(LinkClosed):
            receiver.take()


@pytest.mark.parametrize("reset", [False, True])
def test_the_last_words_are_read_before_a_loss_is_reported(key, reset):
    ours, theirs = links(key)
    ours.post(Rejected(reason="two machines have rank 3"))
    if reset:
        theirs.post(Hello(pack="1", protocol=1))  # unread data make the kernel reset the connection
        ready(ours)
    ours.close()
    assert ready(theirs)
    for _ in range(20):
        theirs.post(Here(rank=0))
    assert taken(theirs) == Rejected(reason="two machines have rank 3")
    with pytest.raises(LinkClosed):
        taken(theirs)
    theirs.close()


def test_a_link_that_is_lost_lets_its_memory_go(key):
    place = bytearray(10)
    ours, theirs = links(key, lambda envelope: [memoryview(place)])
    theirs.post(FromRank(rank=0, body=10), b"0123456789")
    theirs.post(Leave(reason=""))
    payload = bytearray(8 << 20)
    theirs.post(FromRank(rank=0, body=len(payload)), payload)
    assert theirs.unsent
    theirs.close()
    payload.clear()  # raises BufferError while anybody has a view
    assert taken(ours).body == 10
    ours.close()
    place.clear()


def test_payloads_that_do_not_fit_are_refused_at_home(pair):
    ours, theirs, _ = pair
    with pytest.raises(ValueError, match="has 5 bytes, and its memory 4"):
        theirs.post(FromRank(rank=0, body=5), b"four")
    with pytest.raises(ValueError, match="at most 65536"):
        theirs.post(Leave(reason="x" * 70_000))
    theirs.post(Here(rank=3))
    assert taken(ours) == Here(rank=3), "nothing of them was sent"


def header(size: int) -> bytes:
    return link._HEADER.pack(link._MAGIC, size)


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\n\r\n", header(0) + b"\0", header((1 << 16) + 1), header(2**32 - 1), header(5) + b"\xc1" * 5,
    b"ASC1" + packed(Here(rank=1))[4:], header(9) + msgspec.msgpack.encode({"type": "X"}) + b"\0" * 9,
    header(5) + b"\x91" * 5, packed(FromRank(rank=0, body=-5)), packed(FromRank(rank=0, body=1 << 50)),
    packed(Region(job=1, lent=0, shape=(1,), starts=(0,), sizes=(1 << 30, 1 << 30, 1 << 30), itemsize=4)),
    packed(Region(job=1, lent=0, shape=(1,), starts=(0,), sizes=(1 << 62,) * 300, itemsize=4)),
])  # fmt: skip
def test_what_is_no_envelope_ends_the_link(key, data):
    ours, theirs = established(*connected(), key)
    receiver = Link(ours, lambda envelope: pytest.fail("a place for an impossible payload"))
    theirs.send(data)
    with pytest.raises(Undecodable):
        taken(receiver)
    assert receiver.fileno() == -1
    theirs.close()


def test_a_place_that_does_not_fit_or_is_refused_ends_the_link(key):
    def refused(envelope):
        raise Undecodable("no such job")

    for place, error in ((lambda envelope: [memoryview(bytearray(4))], "memory 4"), (refused, "no such job")):
        ours, theirs = links(key, place)
        theirs.post(FromRank(rank=0, body=5), bytes(5))
        with pytest.raises(ValueError, match=error):
            taken(ours)
        assert ours.fileno() == -1
        theirs.close()


@pytest.fixture
def count(request):
    return lambda few: 2_000 if request.config.getoption("--all-messages") else few


def test_random_bytes_after_the_handshake_end_the_link(key, count, record_property):
    seed = random.randrange(2**32)
    record_property("shown", f"links: bytes of seed {seed}")
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(count(30)):
        ours, theirs = established(*connected(), key)
        receiver = Link(ours, lambda envelope: None)
        theirs.send(disturbed(rng))
        theirs.close()
        with pytest.raises((LinkClosed, Undecodable)):
            while True:
                taken(receiver)
        assert receiver.fileno() == -1


def disturbed(rng: random.Random) -> bytes:
    """Envelopes with payloads, some bytes of which are changed, missing or too many."""
    data = bytearray()
    for envelope in rng.choices(ENVELOPES, k=4):
        data += packed(envelope) + bytes(min(envelopes.payload_bytes(envelope), 300))
    for _ in range(rng.randint(1, 5)):
        place = rng.randrange(len(data))
        data[place : place + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
    return bytes(data)


def test_random_bytes_instead_of_tls_records_end_the_link(key):
    rng = random.Random(6)
    for _ in range(10):
        (ours, outer), (inner, theirs) = connected(), connected()
        recorder = Recorder(inner, outer)
        receiver, sender = map(Link, established(ours, theirs, key), [lambda envelope: None] * 2)
        sender.post(Here(rank=0))
        assert taken(receiver) == Here(rank=0)
        record = b"\x17\x03\x03\x00\x20" + rng.randbytes(32)
        outer.send(rng.choice([rng.randbytes(100), record, b"\x16\x03\x01\xff\xff"]))
        if rng.random() < 0.5:
            sender.post(Here(rank=1))
        sender.close()
        with pytest.raises(LinkClosed):
            while True:
                taken(receiver)
        recorder.join(DEADLINE)


def test_nothing_of_a_prompt_or_a_tensor_can_be_read_on_the_wire(key):
    (ours, outer), (inner, theirs) = connected(), connected()
    recorder = Recorder(inner, outer)
    ours, theirs = map(Link, established(ours, theirs, key), [lambda envelope: None] * 2)
    tensor = torch.arange(20_000, dtype=torch.float32)
    for message in (Encode(job=1, encoder=TextEncoderSpec(path="/models"), text=PROMPT), Ping(job=2, tensor=tensor)):
        with SealedMessage(message) as sealed:
            theirs.post(Deliver(ranks=(0,), body=len(sealed.body), block=len(sealed.block)), sealed.body, sealed.block)
            taken(ours, theirs)
    ours.post(FromRank(rank=0, body=len(PROMPT)), PROMPT.encode())
    taken(theirs)
    ours.close()
    theirs.close()
    recorder.join(DEADLINE)
    assert len(recorder.sent) > tensor.nbytes and len(recorder.answered) > len(PROMPT)
    for record in (recorder.sent, recorder.answered):
        for secret in (PROMPT.encode()[:8], b"lighthouse", b"Encode", b"/models", b"atlas", bytes(64),
                       bytes(tensor[500:504].numpy()), link._MAGIC):  # fmt: skip
            assert secret not in record, secret


def test_a_recorded_connection_cannot_be_played_again(key):
    (ours, outer), (inner, theirs) = connected(), connected()
    recorder = Recorder(inner, outer)
    ours, theirs = map(Link, established(ours, theirs, key), [lambda envelope: None] * 2)
    theirs.post(Hello(pack="1", protocol=1))
    assert isinstance(taken(ours), Hello)
    ours.close()
    theirs.close()
    recorder.join(DEADLINE)
    ours, stranger = connected()
    handshake = tls.Handshake(ours, key, server=True)
    stranger.sendall(recorder.sent)
    with pytest.raises(ValueError, match="AV-1909"):
        until = time.monotonic() + DEADLINE
        while handshake.step() is None and time.monotonic() < until:
            ready(handshake, handshake.events, 0.1)
    stranger.close()


def test_a_connection_ends_when_the_other_side_no_longer_confirms():
    ours, theirs = connected()
    link.keep_alive(ours, 8.5)
    options = {name: ours.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in (
        "TCP_NODELAY", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_USER_TIMEOUT")}  # fmt: skip
    assert options == {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_USER_TIMEOUT": 8500}
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    ours.close()
    theirs.close()


def test_new_keys_of_tls_change_nothing(key, key_file):
    """`openssl s_client` sends a key update for both ways, and then an envelope."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = subprocess.Popen(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}", "-tls1_3",
             "-cert", key_file, "-key", key_file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        listener.settimeout(DEADLINE)
        ours, _ = listener.accept()
    handshake = tls.Handshake(ours, key, server=True)
    while (sock := handshake.step()) is None:
        assert ready(handshake, handshake.events)
    receiver = Link(sock, lambda envelope: None)

    def write(line: bytes):
        client.stdin.write(line)
        client.stdin.flush()

    write(packed(Here(rank=1)) + b"\n")
    assert taken(receiver) == Here(rank=1) and receiver.take() is None
    write(b"K\n")  # a command, as it is at the beginning of what the program reads at once
    assert ready(receiver) and receiver.take() is None
    receiver.post(Here(rank=2))  # goes after the update's answer
    write(b"x" * 8)
    with pytest.raises(Undecodable):
        taken(receiver)
    output = client.communicate(timeout=DEADLINE)[0]
    assert b"KEYUPDATE" in output and packed(Here(rank=2)) in output, output
