"""A rank's loop: receives a message, runs it in the pipeline, and replies."""

from __future__ import annotations

import os
import traceback

import torch
import torch.distributed as dist
from msgspec.structs import replace

from ..errors import code_of, coded
from ..hardware import devices
from ..parallel.machines import MACHINE, know_machines, machines
from ..specs.paths import with_paths
from ..wire.channel import Channel, ChannelClosed
from ..wire.messages import (
    UNREAD,
    Cancel,
    Choose,
    Decode,
    Describe,
    Encode,
    EncodeTokens,
    EncodeVideo,
    Failed,
    Free,
    Load,
    Located,
    Message,
    Ping,
    Ready,
    Sample,
    Shutdown,
    Undecodable,
    Velocity,
)
from .job import Cancelled, Job, PeerFailed
from .machine.joining import join_group
from .pipeline import RankPipeline


def serve(channel: Channel) -> None:
    """Joins the group, reports that this rank is ready, and serves jobs until the client disconnects."""
    torch.set_grad_enabled(False)
    kind = os.environ["ASCEND_RUNTIME_DEVICE"]
    device = devices.take(kind, int(os.environ["LOCAL_RANK"]))
    group = join_group(kind)
    machine = os.environ.get(MACHINE, "") if group else ""
    know_machines(machine)
    pipeline = RankPipeline(device)
    code = 0
    try:
        channel.send(Ready(rank=dist.get_rank(), group=group))
        while _serve_one(channel, pipeline):
            pass
    except ChannelClosed:
        # A client may end without a Shutdown. A relay that does has failed, and torchrun is to start this rank again.
        code = 1 if machine else 0
    os._exit(code)  # destroying a process group can wait for peers that have left already


def _serve_one(channel: Channel, pipeline: RankPipeline) -> bool:
    """Waits for a message and replies to it; False after a Shutdown. An unexpected message gets a reply too, so that a
    client never waits in vain."""
    try:
        message = channel.receive()
    except Undecodable as error:
        _reply(channel, Failed(job=UNREAD, kind="internal", error=coded("AV-1507", str(error))))
        return True
    if isinstance(message, Located):
        pipeline.folders = message.paths
    elif type(message) in _WORK:
        message = with_paths(message, pipeline.folders)
        _reply(channel, _of_machine(_answer(Job(message, channel, pipeline.device), pipeline)))
        if pipeline.device.type == "cpu" and not pipeline.calls.going_on:
            devices.empty_cache(pipeline.device)  # after the reply, for other processes on the host
    elif not isinstance(message, (Cancel, Shutdown)):  # a Cancel may arrive after its job has finished
        error = coded("AV-1507", f"A {type(message).__name__} is not a job.")
        _reply(channel, Failed(job=UNREAD, kind="internal", error=error))
    return not isinstance(message, Shutdown)


def _reply(channel: Channel, answer: Message) -> None:
    """Sends an answer. If it cannot be encoded, as a quoted file name may not be valid text, sends an escaped error."""
    try:
        channel.send(answer)
    except ValueError as error:
        if not isinstance(answer, Failed):
            answer = Failed(job=answer.job, kind="internal", error=str(error))
        channel.send(replace(answer, error=_writable(answer.error), traceback=_writable(answer.traceback)))


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _of_machine(answer: Message) -> Message:
    """An answer of this rank; a failure on another machine than the first names it, as its files are others."""
    known = machines()
    name = known.name_of(known.rank)
    own = isinstance(answer, Failed) and answer.kind in ("user", "internal")
    if not own or name == known.name_of(0):
        return answer
    code, said = code_of(answer.error), f"On {name}: {answer.error}"
    return replace(answer, error=coded(code, said) if code else said)


def _answer(job: Job, pipeline: RankPipeline) -> Message:
    """Runs the job. Every error becomes a reply, so that a user's mistake never ends the rank."""
    number = job.message.job
    try:
        if type(job.message) not in _WITHIN_RUNS:
            pipeline.calls.end()
        return _WORK[type(job.message)](pipeline, job)
    except Cancelled:
        return Failed(job=number, kind="cancelled", error="The job was cancelled.")
    except PeerFailed:
        return Failed(job=number, kind="peer", error="Another rank failed.")
    except ValueError as error:
        return Failed(job=number, kind="user", error=str(error), traceback=traceback.format_exc())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Failed(job=number, kind="internal", error=text, traceback=traceback.format_exc())


_WORK = {
    Ping: RankPipeline.ping,
    Load: RankPipeline.load,
    Encode: RankPipeline.encode,
    EncodeTokens: RankPipeline.encode_tokens,
    Sample: RankPipeline.sample,
    Velocity: RankPipeline.velocity,
    Decode: RankPipeline.decode,
    EncodeVideo: RankPipeline.encode_video,
    Describe: RankPipeline.describe,
    Choose: RankPipeline.choose,
    Free: RankPipeline.free,
}
_WITHIN_RUNS = (Ping, Describe, Choose, Velocity)  # jobs that change nothing that the calls of a run share
