"""`queue` and files: seeds, prompts, workflows that are none, and results that survive full disks and interrupts."""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
from ascend_runtime.commands.queue import (
    QueueError,
    address,
    http as connection,
    command as queue,
    results,
    screen,
    seeds,
    server,
    workflow,
)
from ascend_runtime.commands.interrupts import Interrupts
from lying_comfyui import LyingComfyUI, answer

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "api" / "tiny_wan_text_to_video.json"
RECORD = results.LoggedJob("k", "p", 1, None, "success", 1.5, ["a.mp4"])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*options)`: exit status, table and messages of the command in this process, with prompts.txt of `tmp_path`
    and results in results.jsonl there."""
    monkeypatch.setattr(server, "TICK_S", 0.05)
    monkeypatch.delenv(address.TOKEN_VARIABLE, raising=False)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    parser = argparse.ArgumentParser()
    queue.add_queue_command(parser.add_subparsers(), "")

    def run(*options, graph=WORKFLOW):
        arguments = parser.parse_args(["queue", str(graph), "--prompts", str(tmp_path / "prompts.txt"), "--results",
                                       str(tmp_path / "results.jsonl"), *options])
        status = arguments.run(arguments)
        return status, *capsys.readouterr()

    return run


def command(port, folder, *options):
    """The command line of the same, for a process of its own."""
    return [sys.executable, "-m", "ascend_runtime", "queue", str(WORKFLOW), "--prompts", str(folder / "prompts.txt"),
            "--results", str(folder / "results.jsonl"), "--port", str(port), *options]


def test_seeds_of_overlapping_ranges_come_once_and_in_their_order():
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    for _ in range(300):
        ranges = [range(first, first + draw.randrange(1, 6)) for first in draw.choices(range(20), k=draw.randrange(9))]
        expected = list(dict.fromkeys(number for one in ranges for number in one))
        made = seeds.Seeds(ranges)
        assert list(made) == expected and made.count == len(expected), f"{ranges}, of seed {seed}"


def test_seeds_are_made_one_at_a_time(run, tmp_path):
    many = seeds.parse_seeds("5,0-18446744073709551615")
    assert many.count == 2**64 and list(islice(many, 3)) == [5, 0, 1]
    assert seeds.parse_seeds(",".join(str(number) for number in range(0, 40_000, 2))).count == 20_000
    for wrong in ("18446744073709551616", "9" * 5000, "1-", "\u0661", "1\n-2"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a seed"):
            seeds.parse_seeds(wrong)
    with LyingComfyUI() as lying:
        lying.lies["POST /prompt"] = third_fails
        status, table, log = run("--port", str(lying.port), "--seeds", "0-9999999999")
        assert status == 2 and len(table.splitlines()) == 3
        assert "10,000,000,000 jobs: 1 prompt, 10,000,000,000 seeds each" in log


def third_fails(request):
    count = len(request.comfyui.asked("POST", "/prompt"))
    (answer(status=500) if count == 3 else lambda same: same.prompt())(request)


def records(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def read(path):
    """(results, warnings) of a file."""
    said = []
    return results.Results(path, said.append), said


def test_a_results_file_that_was_cut_anywhere_keeps_all_but_its_last_line(tmp_path):
    path = tmp_path / "results.jsonl"
    made = results.Results(path, pytest.fail)
    for key in ("first", "second"):
        made.add(results.LoggedJob(key, "\u4e00\u53ea\u732b \ud83d", 3, None, "success", 1.5, [f"{key}.mp4"]))
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    assert b"\\ud83d" in whole and "\u4e00".encode() in whole
    for size in range(second, len(whole) + 1):
        path.write_bytes(whole[:size])
        again, said = read(path)
        kept = 2 if size >= len(whole) - 1 else 1
        assert list(again.records) == ["first", "second"][:kept]
        assert len(said) == (second < size < len(whole) - 1), "a job that runs again is said"
        assert path.read_bytes() == (whole if kept == 2 else whole[:second]), "mended"
    path.write_bytes(whole[:-1] + bytes(9))  # as file systems leave it when the power fails
    assert len(read(path)[0].records) == 2 and path.read_bytes() == whole
    path.write_bytes(whole + bytes(9))
    assert len(read(path)[1]) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"# Title", b"# Title\n", b'{"key": 5}\n', b'{"key": "a"}\n{"key": "b", "pro',
                                     b"[]\n", b"\xff\n", b'{"key": "' + b"[" * 9999 + b"\n", b"[" * 99999])
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path, content):
    path = tmp_path / "notes.md"
    path.write_bytes(content)
    with pytest.raises(QueueError, match="has a line that is not a record of this command"):
        read(path)
    assert path.read_bytes() == content


def test_results_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path, tmp_path / "file" / "results", tmp_path / ("x" * 300)):
        with pytest.raises(QueueError, match="Cannot write --results"):
            read(path)


def test_a_job_of_a_cut_line_runs_again_and_no_other(run, tmp_path):
    path = tmp_path / "results.jsonl"
    with LyingComfyUI() as lying:
        assert run("--port", str(lying.port), "--seeds", "0-2")[0] == 0
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        status, table, log = run("--port", str(lying.port), "--seeds", "0-2")
        assert status == 0 and len(table.splitlines()) == 4
        assert "was incomplete and has been removed" in log and log.count("warning:") == 1
        assert len(lying.asked("POST", "/prompt")) == 4
    assert [record["seed"] for record in records(path)] == [0, 1, 2]


def test_a_record_that_cannot_be_written_is_printed_and_no_further_job_runs(tmp_path):
    """The kernel refuses to let the file grow, after room next to it was found."""
    path = tmp_path / "results.jsonl"
    old = (results.LoggedJob(f"old {number}", "p" * 100, number, None, "success") for number in range(700))
    path.write_bytes(b"".join(map(results._encoded, old)))
    before = path.read_bytes()
    assert len(before) > results.OUTCOME + 5000
    (tmp_path / "prompts.txt").write_text("a \u732b\n")
    limit = len(before) + 50
    with LyingComfyUI() as lying:
        done = subprocess.run(
            command(lying.port, tmp_path, "--seeds", "0-3"), cwd=ROOT, capture_output=True, text=True, timeout=60,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert len(lying.asked("POST", "/prompt")) == 1
    assert "Cannot write --results" in done.stderr and "File too large" in done.stderr
    assert path.read_bytes() == before, "no part of a line stays"
    line = next(text for text in done.stderr.splitlines() if text.startswith('{"key"'))
    assert json.loads(line)["files"] == ["a.mp4"] and json.loads(line)["prompt"] == "a \u732b"
    with path.open("a") as file:
        file.write(line + "\n")
    assert len(read(path)[0].records) == 701


def may_mount():
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no file system of its own may be mounted here")
def test_on_a_disk_that_fills_up_the_job_that_ran_is_kept_and_no_other_begins(tmp_path):
    """The disk has just the room that is kept for a record."""
    disk, page = tmp_path / "disk", resource.getpagesize()
    disk.mkdir()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    kept = results.OUTCOME // page + 1
    with LyingComfyUI() as lying:
        line = " ".join(command(lying.port, tmp_path, "--seeds", "0-3")).replace(
            str(tmp_path / "results.jsonl"), str(disk / "results.jsonl"))
        script = f"""mount -t tmpfs -o size={64 * page} none {disk} && head -c {(64 - kept) * page} /dev/zero > {disk}/x
            {line}; status=$?; cp {disk}/results.jsonl {tmp_path}; exit $status"""
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "Cannot keep room for --results" in done.stderr and "No space left" in done.stderr
        assert len(lying.asked("POST", "/prompt")) == 1
    assert [record["status"] for record in records(tmp_path / "results.jsonl")] == ["success"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_way_to_stop_takes_the_job_back(tmp_path, number):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with LyingComfyUI(stays=True) as lying:
        process = subprocess.Popen(
            command(lying.port, tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )  # fmt: skip
        wait_for(lambda: len(lying.asked("GET", "/queue")) > 1)
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 130 and "no job of this command is left" in log and "Traceback" not in log
        assert not lying.jobs
    assert records(tmp_path / "results.jsonl") == []


def wait_for(condition, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupt_while_a_job_is_handed_over_waits_for_the_answer(run):
    """Otherwise the job might reach the queue after it was taken back."""

    def slow(request):
        request.comfyui.jobs.clear()
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        time.sleep(0.5)
        request.comfyui.jobs.append(request.job)
        request.prompt()

    with LyingComfyUI({"POST /prompt": slow}, stays=True) as lying:
        status, _, log = run("--port", str(lying.port))
        assert status == 130 and "no job of this command is left" in log and not lying.jobs


def test_an_interrupt_comes_after_what_must_be_whole():
    done, before = [], signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert done and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("content, said", [
    (b"a cat\n\xff\xfe\n", "it is not valid UTF-8, first in line 2 (byte 0xff)"),
    (b"a\n" * (9 << 20), "it has more than 16 MiB"),
    (b"b" * (2 << 20), "has a line of more than 1 MiB"),
    (b"# c\n", "has no entries"),
])
def test_prompts_that_are_none_are_refused_in_words(run, tmp_path, content, said):
    (tmp_path / "prompts.txt").write_bytes(content)
    status, _, log = run()
    assert status == 2 and said in log and log.startswith("error: ") and len(log) < 600


def test_prompts_may_come_through_a_pipe(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"\xef\xbb\xbfa cat\r\na dog\na cat\n",))
    writer.start()
    with LyingComfyUI() as lying:
        assert run("--port", str(lying.port), "--prompts", str(tmp_path / "pipe"))[0] == 0
    writer.join()
    assert [record["prompt"] for record in records(tmp_path / "results.jsonl")] == ["a cat", "a dog"]


def test_escape_sequences_of_prompts_do_not_reach_the_terminal(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a \x1b]0;pwn\x07\u202ecat\x9b2J\u3000\U0001f469\u200d\U0001f680\n")
    with LyingComfyUI() as lying:
        status, table, log = run("--port", str(lying.port))
    assert status == 0 and "a \\x1b]0;pwn\\x07\\u202ecat\\x9b2J \U0001f469\u200d\U0001f680" in table
    assert not set(table + log) & set("\x1b\x07\u202e\x9b")
    assert records(tmp_path / "results.jsonl")[0]["prompt"].startswith("a \x1b]0;pwn"), "the record is exact"


def test_a_terminal_without_unicode_gets_escapes(tmp_path):
    (tmp_path / "prompts.txt").write_text("\u732b\n")
    with LyingComfyUI() as lying:
        done = subprocess.run(command(lying.port, tmp_path), cwd=ROOT, capture_output=True, timeout=60,
                              env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and rb"a.mp4   \u732b" in done.stdout and rb"\u732b" in done.stderr


def test_a_closed_pipe_is_no_error(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        screen.say("line", stream)
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is buffered goes somewhere


DEEP = '{"1": {"class_type": "A", "inputs": {"x": %s}}}'


@pytest.mark.parametrize("content, said", [
    (DEEP % ("[" * 500 + "]" * 500), "is nested more than 100 levels deep"),
    (DEEP % ("[" * 90_000), "is nested more than 100 levels deep"),
    (DEEP % "NaN", "it has NaN, which is not a number"),
    (DEEP % '"\\ud83d"', "has half a character, '\\ud83d'"),
    (DEEP % ("9" * 5000), "is not valid JSON"),
    ("[]", "is not a ComfyUI workflow"),
    ('{"1": {"class_type": 5, "inputs": {}}}', "is not a ComfyUI workflow"),
    (" " * (17 << 20), "it has more than 16 MiB"),
    (b'{"\xff": 1}', "it is not valid UTF-8"),
    ('{"1": {"class_type": "KSampler\\u001b[2J", "inputs": {}, "_meta": 5}}', "\\x1b[2J"),
])
def test_a_workflow_that_is_none_is_refused_in_words(run, tmp_path, content, said):
    (tmp_path / "graph.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, log = run(graph=tmp_path / "graph.json")
    assert status == 2 and said in log and log.startswith("error: ") and "\x1b" not in log


def test_a_workflow_in_ui_format_needs_a_plain_server(run, tmp_path):
    (tmp_path / "graph.json").write_text('{"nodes": []}')
    log = run("--server", "https://host/comfy", graph=tmp_path / "graph.json")[2]
    assert "comfy-cli, which converts it, supports only http://host:port, not https://host/comfy" in log


def test_a_chain_of_many_nodes_and_many_samplers_is_searched_in_no_time():
    chain = {str(number): {"class_type": "Reroute", "inputs": {"positive": [str(number + 1), 0]}}
             for number in range(20_000)}
    end = {"20000": {"class_type": "Text", "inputs": {"text": "cat"}}}
    samplers = {f"s{number}": {"class_type": "KSampler", "inputs": {"positive": ["0", 0]}} for number in range(2000)}
    began = time.process_time()
    assert workflow.find({**chain, **end, **samplers}, workflow.PROMPT) == [("20000", "text")]
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["nan", "inf", "0", "-1", "x", ""])
def test_a_timeout_is_a_number_of_seconds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give a number of seconds above 0"):
        queue._seconds(text)


def test_a_negative_prompt_that_is_no_text_is_refused(run):
    with LyingComfyUI() as lying:
        log = run("--port", str(lying.port), "--negative", "a\udcff")[2]
        assert "--negative is not valid UTF-8: 'a\\udcff'" in log and not lying.seen


def test_work_beyond_its_time_is_left_to_itself():
    with pytest.raises(TimeoutError):
        connection.within(0.05, lambda: time.sleep(1))
    assert connection.within(1, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        connection.within(1, lambda: 1 / 0)
