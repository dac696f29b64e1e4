"""Runs a workflow on a ComfyUI for every prompt and seed, one after the other; resumes where it was stopped."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from . import QueueError, workflow
from .server import Server

SUCCESS = "success"
COLUMNS = ("seed", "seconds", "result", "prompt")


@dataclass(frozen=True)
class Job:
    """One run of the workflow. key: what it computes, the same in every run."""

    prompt: str
    seed: int | None
    image: Path | None
    graph: dict
    key: str


def add_command(commands, does: str) -> None:
    """Declares the command and its options; `commands` is what argparse's add_subparsers returned, `does` a line of
    help."""
    parser = commands.add_parser("queue", help=does, description=__doc__)
    parser.add_argument("workflow", type=Path, metavar="WORKFLOW", help="workflow JSON, in API or UI format")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE",
                        help="one prompt a line; empty lines and lines that start with # are skipped")
    parser.add_argument("--images", type=Path, metavar="FILE",
                        help="one image path a line, for LoadImage: one for each prompt, or one for all")
    parser.add_argument("--negative", metavar="TEXT", help="negative prompt (default: the workflow's)")
    parser.add_argument("--seeds", type=_seeds, metavar="LIST",
                        help="as 1,2,3 or 0-4: every prompt is run with every seed (default: the workflow's seed)")
    parser.add_argument("--host", default="127.0.0.1", help="ComfyUI's host (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8188, help="ComfyUI's port (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FILE",
                        help="JSON lines, one a finished job; run again with it to do only what is not yet done")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S",
                        help="seconds that one job may run before it is interrupted (default: %(default)g)")
    parser.set_defaults(run=run)


def _seeds(text: str) -> list[int]:
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise argparse.ArgumentTypeError(f"{part!r} is no seed; give numbers and rising ranges, as 1,2,3 or 0-4")
        seeds += range(first, last + 1)
    return seeds


def run(arguments: argparse.Namespace) -> int:
    """The command. Returns the exit status: 0 all succeeded, 1 some did not, 2 could not go on, 130 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # `kill` means what Ctrl+C does, which some shells ignore
        signal.signal(number, signal.default_int_handler)
    results: dict[str, dict] = {}
    jobs: list[Job] = []
    try:
        pairs = _pair_images(arguments)
        results = _read_results(arguments.results)
        graph = workflow.read(arguments.workflow, arguments.host, arguments.port)
        jobs = _make_jobs(graph, arguments, pairs)
        with Server(arguments.host, arguments.port) as server:
            _run_jobs(server, jobs, results, arguments)
    except QueueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing of this command is left in ComfyUI's queue", file=sys.stderr)
        return 130
    finally:
        _print_table([results[job.key] for job in jobs if job.key in results])
    return 0 if all(results[job.key]["status"] == SUCCESS for job in jobs) else 1


def _read_lines(path: Path, option: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise QueueError(f"Cannot read {option} {path}: {error.strerror}. Check the path.") from None
    except UnicodeDecodeError as error:
        raise QueueError(f"{option} {path} is no text in UTF-8 ({error}). Save it as such.") from None
    if not (kept := [line for line in lines if line and not line.startswith("#")]):
        raise QueueError(f"{option} {path} has no line to use. Write one a line; lines that start with # are skipped.")
    return kept


def _pair_images(arguments: argparse.Namespace) -> list[tuple[str, Path | None]]:
    """(prompt, image) of every pair: the images line by line beside the prompts, or one image for all of them."""
    prompts = _read_lines(arguments.prompts, "--prompts")
    if arguments.images is None:
        return [(prompt, None) for prompt in prompts]
    images = [arguments.images.parent / line for line in _read_lines(arguments.images, "--images")]
    if len(images) not in (1, len(prompts)):
        raise QueueError(f"--images {arguments.images} has {len(images)} lines for {len(prompts)} prompts. "
                         "Give one image a prompt, or one for all.")
    if missing := [str(image) for image in images if not image.is_file()]:
        raise QueueError(f"--images {arguments.images} names files that do not exist: {', '.join(missing)}. "
                         "Paths count from the folder of that file.")
    return list(zip(prompts, images if len(images) > 1 else images * len(prompts)))


def _make_jobs(graph: dict, arguments: argparse.Namespace, pairs: list[tuple[str, Path | None]]) -> list[Job]:
    """A job for every prompt and seed; what is asked twice is done once."""
    prompt_widgets = workflow.require(graph, workflow.PROMPT)
    negative_widgets = workflow.require_negative(graph) if arguments.negative is not None else []
    image_widgets = workflow.require_image(graph) if arguments.images else []
    seed_widgets = (workflow.require if arguments.seeds else workflow.find)(graph, workflow.SEED)
    jobs = {}
    for prompt, image in pairs:
        for seed in arguments.seeds or [workflow.get(graph, seed_widgets)]:
            edited = workflow.edited(graph, [
                (prompt_widgets, prompt), (negative_widgets, arguments.negative), (seed_widgets, seed),
                (image_widgets, image and _upload_name(image))])
            key = workflow.digest(edited)
            jobs[key] = Job(prompt, seed, image, edited, key)
    return list(jobs.values())


def _upload_name(image: Path) -> str:
    """A name from the content, so that an image with a new content is a new job."""
    return f"{hashlib.sha256(image.read_bytes()).hexdigest()[:16]}{image.suffix.lower()}"


def _run_jobs(server: Server, jobs: list[Job], results: dict[str, dict], arguments: argparse.Namespace) -> None:
    """Runs the jobs that `results` does not hold as finished, and adds them to it and to the results file."""
    todo = [job for job in jobs if results.get(job.key, {}).get("status") != SUCCESS]
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="job", desc="queue") as bar:
        for job in todo:
            results[job.key] = _run_job(server, job, arguments.timeout, bar)
            _append_result(arguments.results, results[job.key])
            bar.update()


def _run_job(server: Server, job: Job, timeout: float, bar: tqdm) -> dict:
    def on_step(node, step, steps):
        bar.set_postfix_str(f"{job.graph.get(node, {}).get('class_type', node)} {step}/{steps}")

    bar.set_postfix_str(job.prompt[:30])
    record = {"key": job.key, "prompt": job.prompt, "seed": job.seed, "image": job.image and str(job.image)}
    if job.image:
        server.upload(job.image, _upload_name(job.image))
    try:
        return {**record, **_outcome(server.run(job.graph, timeout, on_step))}
    except TimeoutError:
        return {**record, "status": "error", "error": f"ran for more than {timeout:g} s (--timeout): interrupted"}


def _outcome(entry: dict | None) -> dict:
    """status, seconds (of the server), and files or error, from a job's history entry."""
    if entry is None:
        return {"status": "error", "error": "taken from ComfyUI's queue before it ran, or ComfyUI was restarted"}
    status, messages = entry["status"]["status_str"], entry["status"]["messages"]
    kind, last = messages[-1]
    outcome = {"status": status, "seconds": (last["timestamp"] - messages[0][1]["timestamp"]) / 1000}
    if status == SUCCESS:
        return {**outcome, "files": _files(entry["outputs"])}
    if kind == "execution_interrupted":
        return {**outcome, "error": "interrupted in ComfyUI"}
    return {**outcome, "error": f"node {last['node_id']} ({last['node_type']}): {last['exception_message'].strip()}"}


def _files(outputs: dict) -> list[str]:
    """The files a job saved, relative to ComfyUI's output folder."""
    items = [item for node in outputs.values() for listed in node.values() if isinstance(listed, list)
             for item in listed if isinstance(item, dict) and item.get("type") == "output"]
    return [str(Path(item.get("subfolder", "")) / item["filename"]) for item in items]


def _read_results(path: Path | None) -> dict[str, dict]:
    """The last record of every job in a results file, by key; the file is made if need be, before any work is done."""
    results: dict[str, dict] = {}
    if path is None:
        return results
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            for line in file:
                record = json.loads(line)
                results[record["key"]] = record
    except OSError as error:
        raise QueueError(f"Cannot write --results {path}: {error.strerror}. Name another file.") from None
    except (ValueError, TypeError, KeyError):
        raise QueueError(f"--results {path} has a line that is no record of this command: {line[:80]!r}. "
                         "Remove the line, or name another file.") from None
    return results


def _append_result(path: Path | None, record: dict) -> None:
    if path:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _print_table(records: list[dict]) -> None:
    """The prompt comes last, so that wide characters in it shift no column."""
    if not records:
        return
    rows = [COLUMNS, *map(_row, records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)] + [0]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _row(record: dict) -> tuple[str, str, str, str]:
    seconds = f"{record['seconds']:.1f}" if "seconds" in record else "-"
    result = ", ".join(record["files"]) if record["status"] == SUCCESS else f"FAILED: {record['error']}"
    return str(record["seed"]), seconds, " ".join(result.split())[:160] or "no file saved", record["prompt"][:80]
