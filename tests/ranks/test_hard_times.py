"""Threads, callbacks, helpers of ranks, hung ranks: what goes on around a group of ranks leaves it usable or ended."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, JobCancelled, RankDied, RankError, SampleSpec, VaeSpec, VideoSize
from ascend_runtime.client import submission
from killed_client import SHAPE
from new_prompts import new_prompt
from rank_processes import seconds_until

HELPER = """
import os, subprocess
if os.environ.get("RANK") == "0":
    subprocess.Popen(["sleep", "600"])  # holds the rank's output open, as a compiler's worker does
"""


def sample(runtime, specs, **hooks):
    spec = SampleSpec(seed=1, steps=4, guidance_scale=1.0)
    return runtime.sample(specs.model, spec, torch.zeros(SHAPE), specs.text(1), **hooks)


def test_threads_that_start_and_ask_at_once_share_one_group(new_runtime):
    with new_runtime(1) as runtime:
        errors = []

        def attempt(call):
            try:
                call()
            except Exception as error:
                errors.append(error)

        calls = (runtime.start, runtime.ping, runtime.start, runtime.ping)
        threads = [threading.Thread(target=attempt, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not errors and len(runtime.pids) == 1


def test_a_callback_that_asks_for_more_is_refused_and_not_hung(one_rank, specs):
    with pytest.raises(RuntimeError, match="callback of a running job"):
        sample(one_rank, specs, on_progress=lambda *_: one_rank.ping())
    one_rank.ping()


class Interrupt(BaseException):
    """No Exception, as ComfyUI's interrupt is none in its newer versions."""


@pytest.mark.parametrize("error", [Interrupt, KeyboardInterrupt, RuntimeError])
def test_whatever_a_callback_raises_the_ranks_stay(two_ranks, slow, error):
    """In each kind of work; the next job is warm."""
    sample(two_ranks, slow)
    before = two_ranks.pids

    def callback(stage, step, total):
        raise error("from a callback")

    for work in works(two_ranks, slow):
        with pytest.raises(error, match="from a callback"):
            work(on_progress=callback)
        assert two_ranks.pids == before
    with pytest.raises(error):
        sample(two_ranks, slow, should_cancel=lambda: callback("", 0, 0))
    sample(two_ranks, slow)
    assert two_ranks.pids == before and "load" not in stages_of(lambda **hooks: sample(two_ranks, slow, **hooks))


@pytest.fixture(scope="module")
def slow(checkpoints, specs_of):
    """So deep that each kind of work reports progress before it ends."""
    return specs_of(checkpoints(layers=24, text_layers=24))


def works(runtime, specs):
    """A load, an encode, a sample, a decode and an encode_video, each to be called with hooks."""
    yield lambda **hooks: sample(runtime, specs, **hooks)
    yield lambda **hooks: runtime.encode(specs.encoder, new_prompt(), **hooks)
    yield lambda **hooks: runtime.decode(specs.vae, torch.zeros(1, 16, 5, 8, 8), **hooks)
    yield lambda **hooks: runtime.encode_video(specs.vae, torch.zeros(17, 64, 64, 3), **hooks)
    runtime.free()
    yield lambda **hooks: runtime.load(model=specs.model, **hooks)


def stages_of(work) -> set[str]:
    stages = set()
    work(on_progress=lambda stage, step, total: stages.add(stage))
    return stages


def test_a_forked_child_leaves_its_parents_ranks_alone(new_runtime, specs):
    with new_runtime(1) as runtime:
        runtime.ping()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with runtime:
                    assert not runtime.alive and runtime.pids == []
                    with pytest.raises(RuntimeError, match="and this is a forked child"):
                        runtime.ping()
                gc.collect()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        before = runtime.pids
        assert before
        runtime.ping()
        assert runtime.pids == before


def test_ranks_end_with_the_runtime_that_nobody_holds(new_runtime, marked):
    environment, living = marked
    runtime = new_runtime(1, **environment)
    runtime.ping()
    assert len(living()) == 1
    del runtime
    gc.collect()
    seconds_until(lambda: not living(), 3.0)


SLEEPS_AT_START = "import os, time\ntime.sleep(60 * ('RANK' in os.environ))"
HALF_READY = """
import os
if "RANK" in os.environ:
    import socket, time
    control = socket.socket(fileno=int(os.environ["ASCEND_RUNTIME_CONTROL_FD"]))
    control.send({said!r})
    time.sleep(60)
"""


@pytest.fixture
def at_start(new_runtime, tmp_path):
    """`at_start(code)`: a runtime whose rank runs this code first."""
    made = []

    def runtime(code):
        (tmp_path / "sitecustomize.py").write_text(code)
        made.append(new_runtime(1, PYTHONPATH=str(tmp_path)))
        return made[-1]

    yield runtime
    for one in made:
        one.stop()


def ends_soon(thread, seconds=8.0):
    thread.join(seconds)
    assert not thread.is_alive()


def test_a_stop_does_not_wait_for_ranks_that_start(at_start):
    runtime, raised = at_start(SLEEPS_AT_START), []

    def start():
        with pytest.raises(JobCancelled):
            runtime.start()
        raised.append(True)

    starter = threading.Thread(target=start)
    starter.start()
    time.sleep(0.3)
    runtime.stop()
    ends_soon(starter)
    assert raised


@pytest.mark.parametrize("said, error", [(b"ASC1", JobCancelled), (b"x" * 100, RankDied)])
def test_a_rank_that_begins_with_no_whole_message_keeps_nobody_waiting(at_start, said, error):
    runtime, began = at_start(HALF_READY.format(said=said)), time.monotonic()
    threading.Timer(1.5, runtime.cancel).start()
    with pytest.raises(error):
        runtime.ping()
    assert time.monotonic() - began < 10


def test_a_stop_cancels_the_jobs_that_wait_for_their_turn_too(new_runtime, slow):
    outcomes = []

    def decode():
        try:
            outcomes.append(runtime.decode(slow.vae, torch.zeros(1, 16, 20, 8, 8)))
        except JobCancelled:
            outcomes.append("cancelled")

    with new_runtime(1) as runtime:
        runtime.load(vae=slow.vae)
        threads = [threading.Thread(target=decode) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        runtime.stop()
        for thread in threads:
            ends_soon(thread)
    assert outcomes == ["cancelled"] * 4


def test_free_waits_for_no_job_and_counts_when_that_is_done(two_ranks, slow):
    """Also in a callback: ComfyUI asks for memory in whatever thread."""
    took = []

    def free(*_):
        began = time.monotonic()
        two_ranks.free()
        took.append(time.monotonic() - began)

    two_ranks.load(slow.model)
    sample(two_ranks, slow, on_progress=lambda *_: took or free())
    assert len(took) == 1 and took[0] < 0.1
    assert "load" in stages_of(lambda **hooks: sample(two_ranks, slow, **hooks))


def test_a_rank_that_refuses_waits_for_one_that_still_reads(two_ranks, specs, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "PEER_DEADLINE", 0.5)
    (tmp_path / "vae.safetensors").write_bytes(b"no such thing")
    before = two_ranks.pids
    os.kill(before[0], signal.SIGSTOP)
    threading.Timer(2.0, os.kill, (before[0], signal.SIGCONT)).start()
    with pytest.raises(ValueError, match="vae.safetensors"):
        two_ranks.load(encoder=specs.encoder, vae=VaeSpec(path=str(tmp_path / "vae.safetensors")))
    assert two_ranks.pids == before


def test_a_notice_that_cannot_be_shown_costs_no_job(two_ranks, specs, monkeypatch):
    monkeypatch.setattr(submission, "SILENCE", 0.2)
    monkeypatch.setattr(submission, "LONGER", 0)
    shown = []
    sample(two_ranks, specs)
    os.kill(two_ranks.pids[0], signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (two_ranks.pids[0], signal.SIGCONT)).start()
    sample(two_ranks, specs, on_notice=lambda text: shown.append(text) or 1 / 0)
    assert "Rank 0 is stopped by a signal" in shown[0] and "The ranks report again after" in shown[-1]


def test_a_group_that_cannot_be_made_ends_its_rank():
    code = "from ascend_runtime.parallel import mesh; import time\nwith mesh._ended_after(0.3): time.sleep(60)"
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and "Timeout" in ran.stderr


RESTART = """
import os, sys, time
sys.path.insert(0, {root!r})
if len(sys.argv) == 1:
    from ascend_runtime import ParallelSpec, Runtime
    runtime = Runtime(ParallelSpec(ranks=1), device="cpu")
    runtime.start()
    os.execv(sys.executable, [sys.executable, __file__, *map(str, runtime.pids)])
(rank,) = sys.argv[1:]
for _ in range(100):
    state = open(f"/proc/{{rank}}/stat").read().rpartition(")")[2].split()[0]
    if state == "Z":
        break
    time.sleep(0.05)
import ascend_runtime.client.group
print(state, os.path.exists(f"/proc/{{rank}}"))
"""


def test_ranks_from_before_a_restart_are_reaped(tmp_path):
    """As ComfyUI-Manager restarts ComfyUI: the process stays, its program is replaced."""
    script = tmp_path / "restart.py"
    script.write_text(RESTART.format(root=str(Path(__file__).resolve().parents[2])))
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.split() == ["Z", "False"], ran.stderr


def test_a_rank_is_missed_and_its_helper_ended_though_that_holds_its_output(new_runtime, marked, specs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HELPER)
    environment, living = marked
    with new_runtime(2, **environment, PYTHONPATH=str(tmp_path)) as runtime:
        runtime.start()
        (helper,) = psutil.Process(runtime.pids[0]).children()
        killer = threading.Timer(0.5, os.kill, (runtime.pids[0], signal.SIGKILL))
        killer.start()
        began = time.monotonic()
        with pytest.raises(RankDied, match="^AV-1501: Rank 0 of 2 was killed by SIGKILL"):
            while True:
                sample(runtime, specs)
        assert time.monotonic() - began < 60  # the kill came within it, after 0.5 s
        seconds_until(lambda: not living() and not helper.is_running(), 3.0)


def test_a_cancel_does_not_wait_for_the_ranks_to_start(new_runtime, marked, specs):
    environment, living = marked
    with new_runtime(1, **environment) as runtime:
        cancelled_at = []
        timer = threading.Timer(0.3, lambda: (cancelled_at.append(time.monotonic()), runtime.cancel()))
        timer.start()
        with pytest.raises(JobCancelled, match="while the ranks started"):
            sample(runtime, specs)
        assert time.monotonic() - cancelled_at[0] < 2.0
        seconds_until(lambda: not living(), 3.0)
        sample(runtime, specs)


def test_a_cancel_ends_ranks_that_do_not_answer_it(new_runtime, specs, monkeypatch):
    monkeypatch.setattr(submission, "CANCEL_DEADLINE", 1.0)
    with new_runtime(1) as runtime:
        sample(runtime, specs)

        def hang(stage, step, total):
            os.kill(runtime.pids[0], signal.SIGSTOP)
            runtime.cancel()

        with pytest.raises(JobCancelled, match="Rank 0 did not answer in time"):
            sample(runtime, specs, on_progress=hang)
        sample(runtime, specs)


def test_a_cpu_whose_memory_is_full_says_what_takes_less(new_runtime, specs):
    with new_runtime(1) as runtime:
        sample(runtime, specs)  # all threads that a job starts are there
        (rank,) = map(psutil.Process, runtime.pids)
        limit = rank.memory_info().vms + 64 * 2**20
        rank.rlimit(psutil.RLIMIT_AS, (limit, limit))
        large = torch.zeros(VideoSize(width=832, height=832, num_frames=49).latent_shape())
        says = "(?s)^AV-1202: .*allocate memory.*What helps .AV-1202.: .*the frames.*dtype bfloat16.*fsdp"
        with pytest.raises(RankError, match=says):
            runtime.sample(specs.model, SampleSpec(seed=1, steps=1, guidance_scale=1.0), large, specs.text(1))
        assert runtime.pids == [rank.pid], "the rank stays"


def test_a_file_that_is_cut_while_it_is_used_is_told_of(new_runtime, checkpoint, tmp_path):
    """A CPU's ranks compute with the mapped file: there is no other sign than a signal."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    spec, text = SampleSpec(seed=1, steps=50, guidance_scale=1.0), torch.zeros(1, 512, tiny_models.TEXT_DIM)

    def cut(stage, step, total):
        if stage == "denoise":
            os.truncate(weights, 0)

    with new_runtime(1) as runtime:
        with pytest.raises(RankDied, match="(?s)^AV-1502: .*SIGBUS.*What helps .AV-1502.: A model's file"):
            runtime.sample(DiffusionModelSpec(path=str(folder)), spec, torch.zeros(SHAPE), text, on_progress=cut)
        with pytest.raises(ValueError, match="^AV-1302: .* is empty"):
            runtime.sample(DiffusionModelSpec(path=str(folder)), spec, torch.zeros(SHAPE), text)
