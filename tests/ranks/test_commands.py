"""The command line: what is answered before anything heavy is imported, what is said meanwhile, and how it ends."""

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from argparse import Namespace
from pathlib import Path

import pytest
from ascend_runtime import VideoSize, __main__
from ascend_runtime.commands import progress as progress_module
from ascend_runtime.models.wan.defaults import WAN22_BOTH
from ascend_runtime.commands.progress import ProgressDisplay
from ascend_runtime.commands.video_options import size_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = "assets/tiny_wan"
PROMPT = ("--prompt", "a red circle moving right on a blue background")
COMPARE = ("compare", MODEL, *PROMPT, "--setting", "step_cache=fast")
# Runs commands one after the other in one process: the exit status of each, what it printed, and what it imported.
PROBE = """
import contextlib, io, json, sys
from ascend_runtime.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
    heavy = sorted({*HEAVY} & {*sys.modules})
    print(json.dumps([status, out.getvalue(), err.getvalue(), heavy]))
"""
HEAVY = ("torch", "numpy", "diffusers", "transformers", "matplotlib", "kornia", "av", "PIL")
ANSWERED = [  # arguments, exit status, what is said
    ([], 2, "usage: python -m ascend_runtime"),
    (["--help"], 0, "measure the calibration of TeaCache and MagCache"),
    (["nothing"], 2, "invalid choice: 'nothing'"),
    (["inspect"], 2, "required: PATH"),
    *(([name, "--help"], 0, "exit status: 0 success") for name in ("inspect", "convert", "calibrate", "compare")),
    (["queue", "--help"], 0, "exit status: 0 all jobs succeeded"),
    (["doctor", "--help"], 0, "exit status: 0 no error"),
    (["cluster", "--help"], 0, "exit status: 0 success"),
    (["cluster", "new", "--help"], 0, "--listen HOST:PORT"),
    (["cluster"], 2, "required: ACTION"),
    (["cluster", "new", "x", "--listen", "atlas1", "--ranks", "16"], 2, "error: listen is 'atlas1'; give HOST:PORT"),
    (["cluster", "show", "\x1b[2J"], 2, r"error: AV-1901: The name of the cluster is '\x1b[2J'; give 1 to 64 letters"),
    (["doctor", "--models", "/\x1b]0;pwn\x07"], 2, r"error: --models: /\x1b]0;pwn\x07 is not a folder"),
    (["inspect", "/nowhere"], 2,
     "error: AV-1301: /nowhere does not exist. Give the path of a model's folder or file.\n"),
    (["inspect", ""], 2, "error: AV-1301: The path is empty. Give the path of a model's folder or file.\n"),
    (["inspect", "/\x1b]0;pwn\x07"], 2, r"error: AV-1301: /\x1b]0;pwn\x07 does not exist."),
    (["inspect", "assets", "\x1b[2J"], 2, r"unrecognized arguments: \x1b[2J"),
    (["inspect", "/dev/null"], 2, "error: AV-1301: /dev/null is neither a folder nor a file."),
    (["inspect", "x" * 5000], 2, "cannot be a path"),
    (["convert", "/nowhere", "/tmp/made", "--to", "diffusers"], 2, "error: AV-1301: /nowhere does not exist"),
    (["convert", MODEL, "assets", "--to", "diffusers"], 2, "assets exists. Give another target, or move it away."),
    (["convert", MODEL, "/tmp/made", "--to", "gguf"], 2, "invalid choice: 'gguf'"),
    (["convert", MODEL, "/tmp/made", "--to", "diffusers", "--shard-size", "big"], 2, "Give a number and a unit"),
    (["calibrate", "/nowhere"], 2, "error: AV-1301: /nowhere does not exist"),
    (["calibrate", MODEL, "--size", "32"], 2, "error: --size is '32'; give WIDTHxHEIGHT, such as 832x480.\n"),
    (["calibrate", MODEL, "--random-prompts", "0"], 2, "--random-prompts is 0; give 1 or more"),
    (["calibrate", MODEL, "--output", "/nowhere/x.json"], 2, "whose folder does not exist"),
    (["calibrate", f"{MODEL}/model_index.json"], 2, "Give one with --text-encoder"),
    (["compare", MODEL, *PROMPT], 2, "required: --setting"),
    ([*COMPARE, "--setting", "teacache"], 2, "error: --setting teacache: There is no accelerator 'teacache'"),
    ([*COMPARE, "--size", "60x64"], 2, "error: width is 60; it must be a multiple of 16, from 16 to 16384. The nearest "
     "are 48 and 64.\n"),
    ([*COMPARE, "--size", "64x99999999"], 2, "The nearest is 16384."),
    ([*COMPARE, "--frames", "6"], 2, "num_frames is 6; it must be 4n+1, from 1 to 4093. The nearest are 5 and 9."),
    ([*COMPARE, "--steps", "0"], 2, "steps is 0; it must be between 1 and 1000"),
    ([*COMPARE, "--guidance", "nan"], 2, "guidance_scale is nan"),
    ([*COMPARE, "--seed", "-1"], 2, "seed is -1"),
    ([*COMPARE, "--fps", "0"], 2, "--fps is 0"),
    ([*COMPARE, "--repeats", "0"], 2, "--repeats is 0; give 1 or more"),
    ([*COMPARE, "--ranks", "-1"], 2, "ranks is -1"),
    ([*COMPARE, "--parallel", "ulises_degree=2"], 2, "There is no field ulises_degree; the fields are ranks"),
    ([*COMPARE, "--device", "tpu"], 2, "invalid choice: 'tpu'"),
    ([*COMPARE, "--vae", "/nowhere"], 2, "error: AV-1301: /nowhere does not exist"),
    ([*COMPARE, "--output", "README.md"], 2, "which is not a folder"),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    probe = PROBE.replace("HEAVY", repr(HEAVY))
    command = [sys.executable, "-c", probe, json.dumps([arguments for arguments, *_ in ANSWERED])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(ANSWERED)), ids=lambda number: " ".join(ANSWERED[number][0])[-60:])
def test_what_can_be_answered_without_torch_is(answers, number):
    arguments, expected, says = ANSWERED[number]
    status, out, err, heavy = answers[number]
    assert status == expected and says in " ".join(((out or err) if expected == 0 else err).split(" ")), (out, err)
    assert heavy == [] and "Traceback" not in err
    assert expected == 0 or out == ""
    assert not {"\x1b", "\x07"} & {*out, *err}
    assert not err.startswith("error:") or err.count("\n") == 1


def test_they_are_answered_at_once():
    for arguments in (["--help"], ["compare", "--help"], ["inspect", "/nowhere"]):
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "ascend_runtime", *arguments], cwd=ROOT, capture_output=True, timeout=60)
        assert time.monotonic() - began < 3, arguments


def test_a_models_own_multiple_has_its_nearest_sizes_named():
    """Wan2.2-TI2V-5B's latents are of 16 x 16 pixels, and its tokens of 2 x 2 of these."""
    given = Namespace(size="848x480", frames=None)
    assert size_of(given, WAN22_BOTH.size) == VideoSize(width=848, height=480, num_frames=121)
    with pytest.raises(ValueError, match="width is 848; .* multiple of 32. The nearest are 832 and 864."):
        size_of(given, WAN22_BOTH.size, 32)


@pytest.mark.parametrize("command", ["convert", "calibrate", "compare", "queue"])
def test_every_option_says_what_it_is(command):
    done = subprocess.run([sys.executable, "-m", "ascend_runtime", command, "--help"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env={**os.environ, "COLUMNS": "200"})  # fmt: skip
    options = re.findall(r"^  (--[a-z-]+.*(?:\n {10,}.*)*)$", done.stdout, re.MULTILINE)
    assert len(options) > 1 and "next four" not in done.stdout
    assert [option for option in options if not re.search(r"\S\s\s+\S", option)] == []


@pytest.mark.parametrize("path, closed, status, out, err", [
    (f"{MODEL}/vae", (1,), 0, "", f"inspecting {MODEL}/vae\n"),
    ("/nowhere", (2,), 2, "", ""),
    ("/nowhere", (0, 1, 2), 2, "", ""),
])  # fmt: skip
def test_a_closed_stream_is_one_that_nobody_reads(path, closed, status, out, err):
    """As `>&-` closes it."""
    shell = " ".join(f"{number}>&-" for number in closed)
    command = f"exec {sys.executable} -m ascend_runtime inspect {path} {shell}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    first = "".join(done.stderr.splitlines(keepends=True)[:1])  # a busy machine has more to say meanwhile
    assert (done.returncode, done.stdout, first) == (status, out, err)


# What is said meanwhile


class Lines(io.StringIO):
    """Notes when each line came."""

    def __init__(self):
        super().__init__()
        self.times = []

    def write(self, text):
        self.times += [time.monotonic()] * text.count("\n")
        return super().write(text)


def test_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress_module, "REFRESH", 0.05)
    out = Lines()
    with ProgressDisplay(out, every=0.3) as progress:
        progress.say("two videos")
        progress.begin("starting the ranks")
        time.sleep(0.7)  # nothing is reported, as while a library is imported
        progress.title("video 1 of 2")
        for step in range(1, 5):
            progress.on_progress("denoise", step, 20)
            time.sleep(0.2)
        progress.on_progress("load", 3 * 10**9, 4 * 10**9)
        time.sleep(0.7)
    first, *others = out.getvalue().splitlines()
    gaps = [later - earlier for earlier, later in zip(out.times, out.times[1:])]
    assert first == "two videos" and min(gaps) >= 0.29 and sum(gaps) > 1, out.getvalue()
    shapes = [r"starting the ranks, 00:0\d",
              r"video 1 of 2: denoise: +(5|10|15|20)% [1234]/20 \[00:0\d<\d\d:\d\d, .*step",
              r"video 1 of 2: load: +75% 3.00G/4.00G \[00:0\d<00:0\d, .*B/s"]  # fmt: skip
    matched = [next(number for number, shape in enumerate(shapes) if re.match(shape, line)) for line in others]
    assert sorted(matched) == matched and set(matched) == {0, 1, 2}, out.getvalue()


def test_what_a_terminal_obeys_is_written_out():
    out = io.StringIO()
    with ProgressDisplay(out) as progress:
        progress.say("looking at a\x1b[2J\nb")
        progress.begin("weights of \x1b]0;pwn\x07", total=2)
        progress.note("\x9b2J", now=True)
        progress.refuse(ValueError("\u202ex"))
    written = out.getvalue()
    assert not set(written) & set("\x1b\x07\x9b\u202e") and r"a\x1b[2J" in written and r"error: \u202ex" in written


def test_units_that_were_done_before_take_none_of_the_time():
    out = io.StringIO()
    with ProgressDisplay(out) as progress:
        progress.begin("queue", total=4, unit="job")
        progress.skip()
        progress.skip()
        time.sleep(0.2)
        progress.advance(1)
        progress.note("a cat")
        progress.finish()
    assert re.fullmatch(r"queue:  75% 3/4 \[00:00<00:00,  [2-5]\.\d\djob/s, a cat\]\n", out.getvalue()), out.getvalue()


def test_nothing_is_said_of_what_takes_no_time():
    out = io.StringIO()
    with ProgressDisplay(out) as progress:
        progress.begin("weights", total=10, done=4, unit="B")
        progress.advance(6)
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        with ProgressDisplay(terminal) as progress:
            for step in (1, 2, 3):
                progress.on_progress("denoise", step, 3)
                time.sleep(0.15)
            progress.say("a line above it")
    shown = "".join(read_all(ours))
    os.close(ours)
    assert re.search(r"\rdenoise: .*\| [23]/3 \[", shown) and "\ra line above it\r\n" in shown, shown
    assert re.search(r"\r *\r?$", shown), "the bar is gone at the end"


def read_all(terminal: int):
    """What was written to a terminal that is closed at its other end."""
    while True:
        try:
            yield os.read(terminal, 4096).decode(errors="replace")
        except OSError:
            return


# How it ends


@pytest.mark.parametrize("number, rank_is_there", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_an_interrupt_ends_the_ranks_and_is_one_line(tmp_path, marked, number, rank_is_there):
    """Ctrl+C while a rank starts; what `kill` sends, while torch is imported."""
    environment, ranks = marked
    made = tmp_path / "new" / "made"
    command = [sys.executable, "-m", "ascend_runtime", *COMPARE, "--steps", "1000", "--output", str(made)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert process.stderr.readline() == f"comparing the plain video of {MODEL} with one setting\n"
        if rank_is_there:
            said = "2 videos of 64x64, 17 frames, 1000 steps, shift 3, guidance 4; 1 rank on cpu\n"
            assert process.stderr.readline() == said
            deadline = time.monotonic() + 60
            while 0 not in ranks() and time.monotonic() < deadline:
                time.sleep(0.1)
        else:
            time.sleep(0.5)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and out == "" and err.splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks() and not list(tmp_path.iterdir()), "the folder that was made is gone again"


def test_a_model_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys):
    """What is found out once torch is imported: the exit status is another."""
    folder = shutil.copytree(ROOT / MODEL / "transformer", tmp_path / "model" / "transformer").parent
    (folder / "ascend_defaults.json").write_text('{"steps": "many"}')
    arguments = ["compare", str(folder), *COMPARE[2:], "--output", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", ["ascend_runtime", *arguments])
    assert __main__.main() == 1
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert first == f"comparing the plain video of {folder} with one setting" and out == ""
    assert second.startswith(f"error: AV-1309: {folder}/ascend_defaults.json cannot be used: ")


def test_who_reads_the_output_may_leave(tmp_path):
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    command = [sys.executable, "-m", "ascend_runtime", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, timeout=60)
    reader.stdin.close()
    assert "Traceback" not in done.stderr
