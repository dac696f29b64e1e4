"""Messages and their tensors reach the other side as they left; memory and descriptors do not stay behind."""

import ast
import gc
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from ascend_runtime.specs.jobs import MAX_SEED
from ascend_runtime.wire import messages, packets, shared_memory
from ascend_runtime import specs
from ascend_runtime.wire.messages import Conditioning, Done, Message, Ping, Preview, Sample, SharedTensor
from ascend_runtime.wire.channel import Channel, ChannelClosed, SealedMessage, channel_pair
from ascend_runtime.wire.plans import PlannedJob
from torch import Tensor

MODEL = specs.DiffusionModelSpec(path="/models/wan", low_noise_path="/models/low", dtype="bfloat16", boundary=0.9)
ENCODER, VAE = specs.TextEncoderSpec(path="/models/umt5"), specs.VaeSpec(path="/models/vae", dtype="float16")
LATENT = torch.arange(2 * 3 * 5, dtype=torch.float32).view(1, 2, 3, 1, 5)
MESSAGES = [
    Ping(job=1, tensor=torch.ones(3), reply=7),
    messages.Load(job=2, model=MODEL, encoder=ENCODER, vae=VAE),
    messages.Encode(job=3, encoder=ENCODER, text='ein "Füchslein" 狐狸\n\0'),
    Sample(
        job=4,
        model=MODEL,
        parallel=specs.ParallelSpec(ranks=4, cfg_degree=2),
        spec=specs.SampleSpec(seed=MAX_SEED, sigmas=(1.0, 0.5, 0.0), guidance_scale_low_noise=3.0),
        latent=LATENT,
        positive=Conditioning(
            text=torch.ones(1, 4, 2, dtype=torch.bfloat16),
            concat_latent=LATENT,
            tensors={"attention_mask": torch.ones(1, 4, dtype=torch.int64), "ref_latent": LATENT},
            numbers={"guidance": 6.5, "without": None},
        ),
        noise_mask=torch.zeros(1, 1, 3, 1, 5),
        operators=specs.OperatorSpec(attention="laser", heads_per_call=2),
        warm_up=True,
        profile=specs.ProfileSpec(folder="/profiles", last_step=3, rank=1),
        preview=True,
    ),
    messages.EncodeTokens(
        job=13, encoder=ENCODER, part="text_encoder", ids=torch.arange(4), length=3, places=(1, 2),
        embeddings=[torch.ones(2, 3), torch.zeros(1, 3)],
    ),
    messages.Velocity(
        job=5,
        setting=messages.CallSetting(
            model=MODEL, parallel=specs.ParallelSpec(ranks=2), run=messages.SamplerRun(number=3, sigmas=(1.0, 0.5, 0.0))
        ),
        step=1,
        latents=[LATENT, LATENT + 1],
        passes=[
            messages.ModelPass(branch="cond", latent=1, timesteps=torch.full((1,), 500.0), inputs={"text": 7}),
            messages.ModelPass(branch="uncond", latent=0, timesteps=torch.ones(1, 3), inputs={}, skipped=(1, 2)),
        ],
        fresh=True,
        held={7: torch.ones(1, 4, 2, dtype=torch.bfloat16)},
        drop=(3, 4),
    ),
    messages.EncodeTokens(
        job=13, encoder=ENCODER, part="text_encoder", ids=torch.arange(5), length=4, places=(1,),
        embeddings=[torch.ones(2, 3)],
    ),  # fmt: skip
    messages.Describe(job=6, vae=VAE, model=MODEL),
    messages.Choose(
        job=14, below=2**33,
        planned=PlannedJob(model=MODEL, shape=(1, 16, 21, 90, 160), branches=2, encoder=ENCODER, vae=VAE),
    ),  # fmt: skip
    messages.Free(job=7),
    messages.Cancel(job=8),
    messages.Shutdown(),
    messages.Located(machine="atlas2", paths={"/models": "/mnt/models"}),
    messages.Wrote(job=4, lent=0, shape=(9, 16, 16, 3), starts=(4, 0, 8, 0), sizes=(4, 16, 8, 3), itemsize=4),
    messages.Ready(rank=1),
    messages.Progress(job=9, stage="denoise", step=1, total=2),
    Preview(job=10, step=1, total=2, image=torch.full((2, 3, 3), 200, dtype=torch.uint8)),
    Done(job=11, seconds={"load": 0.5}, info={"spatial": 8}, tensor=LATENT),
    messages.Failed(job=12, kind="user", error="no", traceback="line\n" * 100_000),  # more than the socket's buffer
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]


@pytest.fixture
def ends():
    """Both ends of a control connection."""
    ours, theirs = channel_pair()
    theirs = Channel(theirs)
    yield ours, theirs
    ours.close()
    theirs.close()


def deliver(ends, message):
    """What arrives of `message` at the other end; sent from a thread, as it may be larger than the socket's buffer."""
    sender = threading.Thread(target=ends[0].send, args=(message,))
    sender.start()
    received = ends[1].receive()
    sender.join()
    return received


def assert_same(sent, received):
    assert type(sent) is type(received)
    for name in sent.__struct_fields__:
        ours, theirs = getattr(sent, name), getattr(received, name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs), name
        elif isinstance(ours, msgspec.Struct):
            assert_same(ours, theirs)
        elif name in ("latents", "passes", "embeddings"):
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs):
                assert torch.equal(one, other) if isinstance(one, Tensor) else not assert_same(one, other)
        elif name in ("tensors", "held"):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        else:
            assert ours == theirs and type(ours) is type(theirs), name


def test_every_message_is_tried():
    lending = {messages.Decode, messages.EncodeVideo}  # see test_lent_memory_is_shared
    assert {type(message) for message in MESSAGES} | lending == set(Message.__subclasses__())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(ends, message):
    assert_same(message, deliver(ends, message))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3)], ids=str)
def test_dtypes_and_shapes(ends, dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    assert_same(Done(job=1, tensor=tensor), deliver(ends, Done(job=1, tensor=tensor)))


def test_values_are_bit_exact(ends):
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, torch.pi])
    received = deliver(ends, Done(job=1, tensor=special)).tensor
    assert torch.equal(special.view(torch.int32), received.view(torch.int32))


def test_tensors_that_are_views(ends):
    base = torch.arange(24.0).view(2, 3, 4)
    for view in (base.transpose(0, 2), base[:, 1:, ::2], base[0, 0, 1].expand(3, 3), base.flip(0)):
        assert_same(Done(job=1, tensor=view), deliver(ends, Done(job=1, tensor=view)))


def test_several_tensors_in_one_message(ends):
    """Of odd sizes, one of them empty: each finds its place."""
    message = Sample(
        job=1,
        model=MODEL,
        parallel=specs.ParallelSpec(),
        spec=specs.SampleSpec(),
        latent=torch.randint(0, 255, (7,), dtype=torch.uint8),
        positive=Conditioning(text=torch.randn(3, 3).bfloat16(), clip_vision=torch.ones(5)),
        negative=Conditioning(text=torch.empty(0, 4)),
    )
    assert_same(message, deliver(ends, message))


def test_what_is_received_belongs_to_the_receiver(ends):
    tensor = torch.zeros(4)
    first, second = (deliver(ends, Done(job=1, tensor=tensor)).tensor for _ in range(2))
    first.fill_(1)
    assert not second.any() and not tensor.any()


def test_one_memory_file_for_all_receivers():
    pairs = [channel_pair() for _ in range(4)]
    tensor = torch.randn(1024)
    with SealedMessage(Ping(job=1, tensor=tensor)) as sealed:
        for ours, _ in pairs:
            ours.post(sealed)
    inodes = set()
    for _, theirs in pairs:
        _, descriptors, _, _ = socket.recv_fds(theirs, 1 << 20, 8)
        assert len(descriptors) == 1
        inodes.add(os.fstat(descriptors[0]).st_ino)
        assert os.fstat(descriptors[0]).st_size == tensor.nbytes
        os.close(descriptors[0])
    assert len(inodes) == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("kind, given, lent", [
    (messages.Decode, "latent", "frames"), (messages.EncodeVideo, "frames", "latent")
])  # fmt: skip
def test_lent_memory_is_shared(ends, kind, given, lent):
    with shared_memory.lend((2, 4, 4, 3), torch.float32) as (result, shared):
        received = deliver(ends, kind(job=1, vae=VAE, **{given: LATENT, lent: shared}))
        assert received.vae == VAE and torch.equal(getattr(received, given), LATENT)
        theirs = getattr(received, lent)
        assert isinstance(theirs, SharedTensor) and theirs.fd != shared.fd
        with shared_memory.borrowed(theirs) as written:
            written.copy_(torch.arange(96.0).view(2, 4, 4, 3))
        with pytest.raises(OSError):
            os.fstat(theirs.fd)
    del written
    assert torch.equal(result, torch.arange(96.0).view(2, 4, 4, 3)), "results outlive the loan"


def test_nothing_is_left_of_200_messages(ends):
    def exchange():
        for number in range(200):
            assert deliver(ends, Done(job=number, tensor=torch.ones(100))).tensor.sum() == 100
            with shared_memory.lend((10,), torch.float32) as (frames, shared):
                with shared_memory.borrowed(deliver(ends, Ping(job=1, frames=shared)).frames) as theirs:
                    theirs.fill_(number)
                del theirs
            assert frames[0] == number
        gc.collect()
        return memory_files(), len(os.listdir("/proc/self/fd"))

    def memory_files():
        return Path("/proc/self/maps").read_text().count("memfd:ascend-")

    deliver(ends, Done(job=0, tensor=torch.ones(1)))
    gc.collect()
    before = memory_files(), len(os.listdir("/proc/self/fd"))
    files, descriptors = exchange()
    assert files <= before[0] + 1  # `frames` of the last exchange may still be held
    assert descriptors <= before[1] + 1


def test_the_end_of_the_other_side_is_seen(ends):
    ours, theirs = ends
    assert not ours.poll()
    theirs.close()
    assert ours.poll(1.0)
    with pytest.raises(ChannelClosed):
        ours.receive()
    with pytest.raises(ChannelClosed):
        ours.send(Ping(job=1))


@pytest.mark.parametrize("bytes_sent", [3, 20])
def test_an_end_inside_a_message_is_seen(bytes_sent):
    ours, theirs = channel_pair()
    header = packets._HEADER.pack(packets._MAGIC, 100, 0, 0) + bytes(100)
    theirs.send(header[:bytes_sent])
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.receive()
    ours.close()


def test_only_known_messages_are_read():
    for body in (b"\xc1", msgspec.msgpack.encode({"type": "Unknown"}), msgspec.msgpack.encode({"type": "Ping"})):
        with pytest.raises(messages.Undecodable):
            messages.decode(body, None, [])
    with pytest.raises(ValueError, match="object cannot be sent"):
        messages.encode(Done(job=1, info={"thing": object()}))


@pytest.mark.parametrize("entries", [
    {"numbers": {"guidance": "6"}}, {"numbers": {"": 1.0}}, {"numbers": {"a" * 65: 1.0}},
    {"numbers": {str(number): 1.0 for number in range(17)}}, {"numbers": [1.0]}, {"tensors": {"mask": 5}},
    {"tensors": {"mask": None}}, {"tensors": {str(number): [0, "float32", [1]] for number in range(17)}},
])  # fmt: skip
def test_further_entries_of_a_conditioning_are_bounded_and_typed(entries):
    sample = msgspec.msgpack.decode(messages.encode(MESSAGES[3]).body)
    sample["positive"] |= entries
    with pytest.raises(messages.Undecodable):
        messages.decode(msgspec.msgpack.encode(sample), bytearray(4096), [])


def test_no_pickle_on_the_wire():
    """Neither our own modules name pickle, nor does a message with a tensor call it.

    But for those of files, which are pickles where torch wrote them, and are read by what makes tensors alone.
    """
    root = Path(messages.__file__).parents[1]
    for path in set(root.rglob("*.py")) - set(root.glob("checkpoints/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & {n.split(".")[0] for n in names}, path
    probe = (
        "import pickle, torch\n"
        "from ascend_runtime.wire.messages import Done\n"
        "from ascend_runtime.wire.channel import Channel, channel_pair\n"
        "def refuse(*a, **k): raise AssertionError('pickled')\n"
        "pickle.dumps = pickle.dump = pickle.loads = pickle.load = pickle.Pickler = pickle.Unpickler = refuse\n"
        "ours, theirs = channel_pair()\n"
        "ours.send(Done(job=1, tensor=torch.ones(5), info={'a': [1, 'b']}))\n"
        "print(Channel(theirs).receive().tensor.sum().item())\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", probe], cwd=root.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stdout.strip() == "5.0", ran.stderr
