"""Runs a workflow on a ComfyUI for every prompt and seed, one job at a time, and can resume."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from ..interrupts import Interrupts
from ..progress import ProgressDisplay
from . import QueueError, address, seeds, workflow
from .answers import Entry
from .http import CA_VARIABLE, Connection
from .jobs import Jobs, QueueJob, read_pairs
from .results import SUCCESS, LoggedJob, Results
from .screen import one_line, say
from .server import Server

JOB_COLUMNS = ("seed", "seconds", "result", "prompt")
HOST = "127.0.0.1"
EPILOG = f"""
HTTPS trusts the CAs of requests, or those in the file given by {CA_VARIABLE}.

exit status: 0 all jobs succeeded, now or in an earlier run with the same --results; 1 some failed; 2 an invalid
argument, an unusable file, or the run could not continue; 130 interrupted"""


def add_queue_command(commands, summary: str) -> None:
    """Declares the command and its options. commands: the result of argparse's add_subparsers. summary: a line of help.
    """
    parser = commands.add_parser("queue", help=summary, description=__doc__, epilog=EPILOG,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, metavar="WORKFLOW",
                        help="workflow JSON, in API or UI format, or the name of one of the pack's templates")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE",
                        help="one prompt per line; empty lines and lines that start with # are skipped")
    parser.add_argument("--images", type=Path, metavar="FILE",
                        help="one image path per line, for LoadImage: one for each prompt, or one for all")
    parser.add_argument("--negative", metavar="TEXT", help="negative prompt (default: the workflow's)")
    parser.add_argument("--seeds", type=seeds.parse_seeds, metavar="LIST",
                        help="such as 1,2,3 or 0-4: every prompt runs with every seed (default: the workflow's seed)")
    parser.add_argument("--server", metavar="ADDRESS", help="ComfyUI's address: host, host:port, [::1]:8188, "
                        "http://host:8188, https://host/prefix/; instead of --host and --port")
    parser.add_argument("--host", help=f"ComfyUI's host (default: {HOST})")
    parser.add_argument("--port", type=int, help=f"ComfyUI's port (default: {address.COMFYUI_PORT})")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with a token, which is sent as "
                        f"Authorization: Bearer (default: {address.TOKEN_VARIABLE}, if it is set)")
    parser.add_argument("--results", type=Path, metavar="FILE",
                        help="JSON Lines file, one line per finished job; run again with it to resume")
    parser.add_argument("--timeout", type=_seconds, default=3600, metavar="S",
                        help="seconds after which a running job is interrupted (default: %(default)g)")
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a valid time; give a number of seconds above 0")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Runs the command. Returns the exit status: 0 all succeeded, 1 some failed, 2 could not continue, 130 interrupted.
    """
    command = QueueRun(arguments, [])
    with Interrupts() as interrupts:
        try:
            command.run(interrupts)
        except QueueError as error:
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            left = command.server.left if command.server else None
            say(f"interrupted; job {left} may be left in ComfyUI's queue" if left else
                "interrupted; no job of this command is left in ComfyUI's queue")
            return 130
        finally:
            _print_table(command.shown)
    return 0 if all(record.status == SUCCESS for record in command.shown) else 1


@dataclass
class QueueRun:
    """A run of the command. shown: the records of the jobs so far, including those of earlier runs."""

    arguments: argparse.Namespace
    shown: list[LoggedJob]
    server: Server | None = None

    def run(self, interrupts: Interrupts) -> None:
        """Runs the jobs that are not finished in the results, and adds their records."""
        given = self.arguments
        where = _address(given)
        pairs = read_pairs(given.prompts, given.images)
        results = Results(given.results, say)
        jobs = Jobs(workflow.read(given.workflow, where), pairs, given.seeds, _text(given.negative))
        connection = Connection(where, _authorization(given, where))
        self.server = Server(connection, say)
        with self.server:
            say(f"{jobs}, on {connection.address.url}")
            with ProgressDisplay() as progress:
                progress.begin("queue", total=jobs.count, unit="job")
                try:
                    for job in jobs:
                        self._do(job, results, interrupts, progress)
                        self.shown.append(results.records[job.key])
                finally:
                    progress.finish()

    def _do(self, job: QueueJob, results: Results, interrupts: Interrupts, progress: ProgressDisplay) -> None:
        if results.done(job.key):
            return progress.skip()
        record = LoggedJob(job.key, job.prompt, job.seed, job.image and str(job.image), "error")
        results.reserve(record)
        self._run_job(job, record, Stage(job, progress))
        with interrupts.held():
            results.add(record)
        progress.advance(1)

    def _run_job(self, job: QueueJob, record: LoggedJob, stage: Stage) -> None:
        """Runs a job and fills in `record`."""
        if job.image:
            self.server.upload(job.image)
        timeout = self.arguments.timeout
        try:
            _fill(record, self.server.run(job.graph, timeout, stage.on_step, stage.on_wait))
        except TimeoutError:
            record.error = f"interrupted after {timeout:g} s (--timeout)"


class Stage:
    """Shows a job's progress in the bar's note: its prompt, then its node and step."""

    def __init__(self, job: QueueJob, progress: ProgressDisplay):
        self._job, self._progress, self._node = job, progress, None
        progress.note(one_line(job.prompt, 30))

    def on_step(self, node: str, step: int, steps: int) -> None:
        """Shows a step. The first step of each node is printed at once."""
        kind = self._job.graph.get(node, {}).get("class_type", node)
        self._progress.note(f"{one_line(kind, 60)} {one_line(step, 20)}/{one_line(steps, 20)}", now=node != self._node)
        self._node = node

    def on_wait(self, how: str) -> None:
        self._progress.note(f"{one_line(self._job.prompt, 30)}: {how}")


def _address(arguments: argparse.Namespace) -> address.Address:
    if arguments.server is None:
        return address.of_host(HOST if arguments.host is None else arguments.host,
                               address.COMFYUI_PORT if arguments.port is None else arguments.port)
    if arguments.host is not None or arguments.port is not None:
        raise QueueError("--server is a full address. Remove --host and --port, or --server.")
    return address.parse_address(arguments.server)


def _authorization(arguments: argparse.Namespace, where: address.Address) -> str | None:
    header = address.authorization(arguments.token_env)
    if header and where.scheme == "http" and not where.loopback:
        say(f"warning: the token is sent to {where.url} without encryption, and others in the network can read it. Use "
            "https:// if the server supports it, or a tunnel (ssh -L).")
    return header


def _text(negative: str | None) -> str | None:
    """Raises QueueError for invalid UTF-8 on the command line, which Python represents by lone surrogates."""
    try:
        (negative or "").encode()
    except UnicodeEncodeError:
        raise QueueError(f"--negative is not valid UTF-8: '{one_line(negative, 80)}'. Give it in UTF-8.") from None
    return negative


def _fill(record: LoggedJob, entry: Entry | None) -> None:
    """Fills in status, seconds (on the server), and files or error from a job's history entry."""
    if entry is None:
        record.error = "removed from ComfyUI's queue before it ran, or ComfyUI was restarted"
        return
    record.status, record.seconds = entry.status.status_str, _seconds_of(entry)
    if record.status == SUCCESS:
        record.files, odd = entry.files()
        if odd:
            say(f"warning: {odd} output{'s' * (odd != 1)} of the job {'is' if odd == 1 else 'are'} outside of "
                "ComfyUI's output folder, and not in the results.")
    else:
        record.error = _error(entry)


def _seconds_of(entry: Entry) -> float | None:
    times = [event.data.timestamp for event in entry.status.messages]
    return (times[-1] - times[0]) / 1000 if times and None not in (times[0], times[-1]) else None


def _error(entry: Entry) -> str:
    last = entry.status.messages[-1] if entry.status.messages else None
    if last and last.kind == "execution_interrupted":
        return "interrupted in ComfyUI"
    if not last or last.data.exception_message is None:
        return "ComfyUI reports a failure without a reason; see its log"
    return f"node {last.data.node_id} ({last.data.node_type}): {last.data.exception_message.strip()[:4000]}"


def _print_table(records: list[LoggedJob]) -> None:
    """Prints the records. The prompt is last, so that wide characters in it do not shift columns."""
    if not records:
        return
    rows = [JOB_COLUMNS, *map(_row, records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(JOB_COLUMNS) - 1)] + [0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    say("\n".join(lines), sys.stdout)


def _row(record: LoggedJob) -> tuple[str, str, str, str]:
    seconds = "-" if record.seconds is None else f"{record.seconds:.1f}"
    result = ", ".join(record.files or []) if record.status == SUCCESS else f"FAILED: {record.error}"
    files = one_line(result, 160) or "no file saved"
    return one_line(record.seed, 24), one_line(seconds, 12), files, one_line(record.prompt, 80)
