"""`python -m ascend_runtime queue`: what it edits in a workflow, and what it does with a real ComfyUI."""

import argparse
import copy
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ascend_runtime.commands.queue import QueueError, address, seeds, workflow
from scripts.lib.comfy_server import ComfyServer, free_port
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CIRCLE, SQUARE = "a red circle moving right on a blue background", "a green square moving left on a white background"
BLANK = {"1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255}},
         "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blank"}}}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def k_sampler():
    """Wan 2.2 image-to-video as core nodes do it: the prompts pass WanImageToVideo, two experts share them."""
    sampler = dict(positive=["w", 0], negative=["w", 1], latent_image=["w", 2], noise_seed=7)
    return {"p": node("CLIPTextEncode", text="cat", clip=["c", 0]), "n": node("CLIPTextEncode", text="bad"),
            "w": node("WanImageToVideo", positive=["p", 0], negative=["n", 0], start_image=["i", 0]),
            "i": node("LoadImage", image="a.png"), "high": node("KSamplerAdvanced", **sampler),
            "low": node("KSamplerAdvanced", **{**sampler, "latent_image": ["high", 0]}), "c": node("CLIPLoader")}


def custom_sampler():
    """SamplerCustomAdvanced: prompt behind guider and FluxGuidance-like nodes and a String node, seed behind noise."""
    return {"s": node("SamplerCustomAdvanced", noise=["r", 0], guider=["g", 0]), "r": node("RandomNoise", noise_seed=7),
            "g": node("CFGGuider", positive=["f", 0], negative=["n", 0]), "n": node("CLIPTextEncode", text="bad"),
            "f": node("FluxGuidance", conditioning=["p", 0], guidance=3.5),
            "p": node("CLIPTextEncode", text=["t", 0]), "t": node("PrimitiveString", value="cat")}


def ascend_sampler():
    return {"1": node("AscendTextEncode", text="cat"), "2": node("AscendTextEncode", text="bad"),
            "3": node("AscendSampler", positive=["1", 0], negative=["2", 0], seed=["4", 0]),
            "4": node("PrimitiveInt", value=7)}


@pytest.mark.parametrize("make, prompt, negative, seed", [
    (k_sampler, [("p", "text")], [("n", "text")], [("high", "noise_seed"), ("low", "noise_seed")]),
    (custom_sampler, [("t", "value")], [("n", "text")], [("r", "noise_seed")]),
    (ascend_sampler, [("1", "text")], [("2", "text")], [("4", "value")]),
])
def test_finds_the_widgets_that_feed_the_samplers(make, prompt, negative, seed):
    graph = make()
    assert workflow.require(graph, workflow.PROMPT) == prompt
    assert workflow.require_negative(graph) == negative
    assert workflow.require(graph, workflow.SEED) == seed and workflow.get(graph, seed) == 7
    edited = workflow.edited(graph, [(prompt, "dog"), (seed, 8)])
    assert workflow.get(edited, prompt) == "dog" and all(workflow.get(edited, [widget]) == 8 for widget in seed)
    assert graph == make(), "the workflow itself stays as it was"
    assert workflow.digest(edited) != workflow.digest(graph)


def test_says_what_it_looked_for_when_a_widget_is_missing():
    with pytest.raises(QueueError, match=r"for a sampler \(AscendSampler, .*nodes are EmptyImage, SaveImage"):
        workflow.require(BLANK, workflow.PROMPT)
    unfed = {"3": node("KSampler", positive=["1", 0], seed=1), "1": node("ConditioningZeroOut")}
    with pytest.raises(QueueError, match=r"No positive prompt .* from KSampler \(3\) along positive, .* widget text"):
        workflow.require(unfed, workflow.PROMPT)
    with pytest.raises(QueueError, match="needs one LoadImage node; the workflow has 0"):
        workflow.require_image(BLANK)


def test_a_negative_prompt_that_is_also_the_positive_one_is_refused():
    graph = ascend_sampler() | {"z": node("ConditioningZeroOut", conditioning=["1", 0])}
    graph["3"]["inputs"]["negative"] = ["z", 0]
    with pytest.raises(QueueError, match=r"no negative prompt of its own: AscendTextEncode \(1\) feeds both"):
        workflow.require_negative(graph)


def test_a_loop_in_a_workflow_ends():
    graph = {"1": node("KSampler", positive=["2", 0]), "2": node("Reroute", conditioning=["2", 0])}
    assert workflow.find(graph, workflow.PROMPT) == []


def test_titles_do_not_make_a_new_job():
    titled = copy.deepcopy(BLANK)
    titled["1"]["_meta"] = {"title": "Other"}
    assert workflow.digest(titled) == workflow.digest(BLANK)


def test_seeds():
    assert list(seeds.parse_seeds("1,2,3")) == [1, 2, 3] and list(seeds.parse_seeds("0-4")) == [0, 1, 2, 3, 4]
    assert list(seeds.parse_seeds("7, 2-3")) == [7, 2, 3]
    for wrong in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a seed"):
            seeds.parse_seeds(wrong)


def test_starts_without_torch():
    code = "import sys, ascend_runtime.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


class Command:
    """The command in a folder of its own, against one server."""

    def __init__(self, folder, port):
        self.folder, self.port, self.results = folder, port, folder / "results.jsonl"

    def write(self, name, content):
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def start(self, graph, prompts, *options):
        """Starts it; `graph` may be a file. Messages and progress go to the file `log`, the table to stdout."""
        path = graph if isinstance(graph, Path) else self.write("workflow.json", graph)
        command = [sys.executable, "-m", "ascend_runtime", "queue", str(path), "--port", str(self.port),
                   "--prompts", str(self.write("prompts.txt", prompts)), "--results", str(self.results), *options]
        with open(self.folder / "log", "w") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def wait_for(self, text, timeout=120):
        deadline = time.monotonic() + timeout
        while text not in self.log:
            assert time.monotonic() < deadline, f"no {text!r} within {timeout} s in {self.log}"
            time.sleep(0.05)

    def __call__(self, *arguments):
        """Runs it; returns exit status and table."""
        process = self.start(*arguments)
        table, _ = process.communicate(timeout=300)
        assert "Traceback" not in self.log
        return process.returncode, table

    @property
    def records(self):
        return [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def server():
    with ComfyServer() as running:
        yield running


@pytest.fixture
def command(tmp_path, server):
    return Command(tmp_path, server.port)


@pytest.fixture(scope="module")
def tiny():
    """The embedded model's own workflow, made short: its smallest picture, 5 frames, 2 steps."""
    graph = json.loads((ROOT / "workflows" / "api" / "tiny_wan_text_to_video.json").read_text())
    for entry in graph.values():
        if entry["class_type"] == "AscendVideoSize":
            entry["inputs"].update(width=32, height=32, seconds=4 / 16)
        if entry["class_type"] == "AscendSampler":
            entry["inputs"]["steps"] = 2
    return graph


def with_steps(graph, steps):
    graph = copy.deepcopy(graph)
    next(entry for entry in graph.values() if entry["class_type"] == "AscendSampler")["inputs"]["steps"] = steps
    return graph


def endless(graph):
    """With as many steps as a sampler takes, of a larger video: the tiny one's are over within some seconds."""
    graph = with_steps(graph, 1000)
    next(entry for entry in graph.values() if entry["class_type"] == "AscendVideoSize")["inputs"].update(
        width=128, height=128, seconds=2
    )
    return graph


def test_every_prompt_with_every_seed_then_only_what_is_new(command, server, tiny):
    prompts = f"# comment\n\n{CIRCLE}\n  {SQUARE}\n"
    status, table = command(tiny, prompts, "--seeds", "3,5", "--negative", "grey")
    assert status == 0, command.log
    assert [(record["prompt"], record["seed"]) for record in command.records] == [
        (CIRCLE, 3), (CIRCLE, 5), (SQUARE, 3), (SQUARE, 5)]
    files = [server.output / record["files"][0] for record in command.records]
    assert len(set(files)) == 4 and all(file.stat().st_size for file in files)
    assert len({file.read_bytes() for file in files}) == 4, "prompt and seed reached the sampler"
    assert re.search(r"AscendSampler [12]/2\]", command.log) and "4/4 [" in command.log.splitlines()[-1]
    assert "4 jobs: 2 prompts, 2 seeds each, on http://127.0.0.1:" in command.log.splitlines()[0]
    assert [line.split()[0] for line in table.splitlines()] == ["seed", "3", "5", "3", "5"]
    assert str(files[0].relative_to(server.output)) in table and SQUARE in table

    history = server.get("/history")
    status, table = command(tiny, prompts, "--seeds", "3,5-6", "--negative", "grey")
    assert status == 0 and len(table.splitlines()) == 7
    assert [(record["prompt"], record["seed"]) for record in command.records[4:]] == [(CIRCLE, 6), (SQUARE, 6)]
    new = [entry["prompt"][2] for name, entry in server.get("/history").items() if name not in history]
    assert [workflow.get(graph, workflow.require_negative(graph)) for graph in new] == ["grey", "grey"]


def test_the_workflows_own_seed_is_kept(command, tiny):
    own = workflow.get(tiny, workflow.require(tiny, workflow.SEED))
    assert command(tiny, CIRCLE)[0] == 0
    assert [record["seed"] for record in command.records] == [own]


def test_images_are_uploaded_and_a_failed_job_is_tried_again(command, server, tiny, tmp_path):
    graph = tiny | {"load": node("LoadImage", image="none.png"),
                    "save": node("SaveImage", images=["load", 0], filename_prefix="copy")}
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image at all")
    images = str(command.write("images.txt", "broken.png\ngood.png\n"))
    status, table = command(graph, f"{CIRCLE}\n{SQUARE}\n", "--images", images)
    assert status == 1
    broken, good = command.records
    assert broken["status"] == "error" and "LoadImage" in broken["error"] and "FAILED: node load (LoadImage)" in table
    copied = next(name for name in good["files"] if name.startswith("copy"))
    assert Image.open(server.output / copied).convert("RGB").getpixel((0, 0)) == (255, 0, 0)

    Image.new("RGB", (8, 8), (0, 255, 0)).save(tmp_path / "broken.png")
    assert command(graph, f"{CIRCLE}\n{SQUARE}\n", "--images", images)[0] == 0
    assert [record["status"] for record in command.records] == ["error", "success", "success"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_it_interrupts_its_job_and_no_other(command, server, tiny, number):
    assert command(tiny, CIRCLE, "--seeds", "11")[0] == 0
    before = command.results.read_bytes()
    process = command.start(endless(tiny), f"{CIRCLE}\n{SQUARE}", "--seeds", "11")
    command.wait_for("/1000]")
    other = server.queue(BLANK)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in command.log and "Traceback" not in command.log
    server.wait(other)
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
    kinds = {entry["status"]["messages"][-1][0] for entry in server.get("/history").values()
             if any(entry["prompt"][2].get(name, {}).get("inputs", {}).get("steps") == 1000 for name in tiny)}
    assert kinds == {"execution_interrupted"}
    assert command.results.read_bytes() == before, "only finished jobs are written"


def test_a_job_beyond_its_time_is_interrupted_and_the_next_one_runs(command, server, tiny):
    status, table = command(endless(tiny), f"{CIRCLE}\n{SQUARE}", "--timeout", "2")
    assert status == 1 and table.count("FAILED: interrupted after 2 s") == 2 and len(command.records) == 2
    assert command(tiny, CIRCLE)[0] == 0


def test_a_job_taken_from_the_queue_is_reported(command, server, tiny):
    ahead = server.queue(endless(tiny))
    process = command.start(tiny, CIRCLE)
    # ComfyUI also lists as pending what it has not begun yet.
    while not (waiting := [job for _, job, *_ in server.get("/queue")["queue_pending"] if job != ahead]):
        assert process.poll() is None, command.log
        time.sleep(0.05)
    server.post("/queue", {"delete": waiting})
    table, _ = process.communicate(timeout=60)
    server.post("/interrupt", {"prompt_id": ahead})
    assert process.returncode == 1 and "FAILED: removed from ComfyUI's queue" in table


def test_a_refused_workflow_names_its_nodes(command, tiny):
    wrong = with_steps(tiny, -1)
    assert command(wrong, CIRCLE) == (2, "")
    assert "ComfyUI rejects the workflow" in command.log
    assert "node 8 (Ascend Sampler): Value -1 smaller than min of 0: steps" in command.log


def test_a_workflow_is_refused_whole_if_one_output_is(command, server, tiny):
    part = with_steps(tiny, 500) | {"save": node("SaveImage", images=["load", 0], filename_prefix="x"),
                                    "load": node("LoadImage", image="none.png")}
    ran = set(server.get("/history"))
    assert command(part, CIRCLE, "--seeds", "77") == (2, "")
    assert "node load (LoadImage): Custom validation failed for node: image - Invalid image file" in command.log
    assert server.get("/queue")["queue_pending"] == [] and command.records == []
    done = [entry for name, entry in server.get("/history").items() if name not in ran]
    assert all(entry["status"]["status_str"] == "error" for entry in done)


def test_a_workflow_in_ui_format_is_converted(command, server):
    ui = {"nodes": [{"id": 1, "type": "EmptyImage", "mode": 0, "inputs": [], "properties": {},
                     "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], "widgets_values": [8, 8, 1, 255]},
                    {"id": 2, "type": "SaveImage", "mode": 0, "outputs": [], "properties": {},
                     "inputs": [{"name": "images", "type": "IMAGE", "link": 1}], "widgets_values": ["blank"]}],
          "links": [[1, 1, 0, 2, 0, "IMAGE"]], "version": 0.4}
    graph = workflow.read(command.write("ui.json", ui), address.of_host("127.0.0.1", server.port))
    assert workflow.digest(graph) == workflow.digest(BLANK)
    with pytest.raises(QueueError, match="could not convert .*Failed to fetch /object_info"):
        workflow.read(command.write("ui.json", ui), address.of_host("127.0.0.1", free_port()))


@pytest.mark.parametrize("graph, prompts, options, said", [
    (None, CIRCLE, [], "No ComfyUI answers at http://127.0.0.1:"),
    (Path("none.json"), CIRCLE, [], "Cannot read the workflow none.json: No such file"),
    ("{", CIRCLE, [], "is not valid JSON"),
    ({"last_node_id": 1}, CIRCLE, [], "is not a ComfyUI workflow"),
    (BLANK, CIRCLE, [], "No positive prompt found"),
    (None, "# nothing\n", [], "has no entries"),
    (None, CIRCLE, ["--prompts", "none.txt"], "Cannot read --prompts none.txt: No such file"),
    (None, CIRCLE, ["--images", "none.txt"], "Cannot read --images none.txt: No such file"),
    (None, CIRCLE, ["--results", "notes.md"], "a line that is not a record of this command: '# Title"),
    (None, CIRCLE, ["--results", "tests"], "Cannot write --results tests: Is a directory"),
])
def test_what_cannot_be_done_is_one_message(tmp_path, tiny, graph, prompts, options, said):
    command = Command(tmp_path, free_port())
    if options == ["--results", "notes.md"]:
        options = ["--results", str(command.write("notes.md", "# Title\n"))]
    if isinstance(graph, str):
        graph = command.write("broken.json", graph)
    assert command(tiny if graph is None else graph, prompts, *options) == (2, "")
    assert command.log.startswith("error: ") and said in command.log
