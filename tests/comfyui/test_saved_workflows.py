"""What users saved still works: the workflows as they were shipped at commit 5cb33f3, in UI and in API format.

`saved_workflows/` holds these files unchanged, and what that commit made of them, as make_reference.py writes it: it
runs that commit's nodes in the tests' ComfyUI, on the models and the image that the tests have.
- jobs.json: what each API format, unchanged, asked the ranks for (see comfy_nodes/recording.py). Where the code gives
  a field of a description another name, it gets that name here too.
- latents.safetensors: what the sampler made, fp32: of tiny Wan as saved, of random models smaller and in 4 steps.
- weights.json: sums of these models' weights, as other random weights make other latents.
"""

import json
import math
from pathlib import Path

import comfy_graphs as graphs
import numpy as np
import published_models
import pytest
import torch
from scripts.lib.comfy_browser import ComfyBrowser, chromium
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SAVED = Path(__file__).resolve().parent / "saved_workflows"
NAMES = sorted(file.stem for file in (SAVED / "api").glob("*.json"))
SAMPLE = [  # without --all-saved-workflows: each kind of node, images, two experts, LoRAs, both VAEs
    "tiny_wan_fast_text_to_video",
    "wan2.1_flf2v_14b_first_last_frame_to_video",
    "wan2.2_i2v_a14b_image_to_video_4_steps",
    "wan2.2_ti2v_5b_image_to_video",
]
SAMPLED_LATENTS = [*SAMPLE, "tiny_wan_text_to_video", "wan2.2_t2v_a14b_text_to_video"]
SAMPLER, DECODE, VIDEO, SAVE = "8", "9", "10", "11"  # nodes that each of them has
NOTES = ("MarkdownNote", "Note")  # of the page only: the API format has none
SOURCES = {"preset"}  # later fields that say where the values of others come from; these are compared themselves
LOADED = ("diffusion_models", "loras", "vae", "text_encoders", "clip_vision")  # folders of the models that they name
MODELS = (*published_models.TRANSFORMERS, *published_models.LORAS, *published_models.VAES,
          published_models.TEXT_ENCODER, published_models.CLIP)  # fmt: skip
SMALL = {"width": 96, "height": 64, "length": 9}
STEPS = 4  # enough for both experts to have their turn

# By how much of its largest value a latent may differ: more than another order of additions makes of it, less than any
# change of a value does. Seen were 5e-6 at most with 1 and 2 ranks, 1 and 2 threads, and a processor's plainest
# instructions (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41, MKL_CBWR=COMPATIBLE).
TOLERANCE = 1e-4
# Where such instructions draw the random weights too, a few of these are rounded to another number of 8 bits: 1.4e-4.
# A strength of 0.99 for 1 makes 5e-3, a cfg of 3.9 for 4 as little as 6e-3.
TOLERANCE_OF_RANDOM_MODELS = 1e-3


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-saved-workflows")
        sample = SAMPLED_LATENTS if metafunc.function is test_an_api_format_makes_the_same_latent else SAMPLE
        metafunc.parametrize("name", NAMES if every else sample)


def ui(name: str) -> dict:
    return json.loads((SAVED / f"{name}.json").read_text())


def api(name: str) -> dict:
    return json.loads((SAVED / "api" / f"{name}.json").read_text())


def write_inputs(base: Path) -> None:
    """The models that the workflows name, small and random, and their image, into a ComfyUI's base directory: each time
    the same."""
    models = base / "models"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # which networks of diffusers and transformers begin with
        published_models.write_all(models)
    for file in (models / "loras").glob("wan2.2_i2v_lightx2v_*"):  # commit 5cb33f3 did not read these
        read = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".diff_m")}
        save_file(read, file)
    rows, columns = np.indices((80, 80))
    pixels = np.stack([rows * 3, columns * 3, (rows + columns) % 32 * 8], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(base / "input" / "example.png")


def weights(base: Path) -> dict[str, float]:
    """Sums of each model's weights without their signs, but those of CLIP's layers, most of which are a hole in its
    file."""
    sums = {}
    for file in sorted(file for folder in LOADED for file in (base / "models" / folder).glob("*.safetensors")):
        if file.stem in MODELS:
            with safe_open(file, framework="pt") as tensors:
                names = [name for name in tensors.keys() if file.stem != published_models.CLIP or "layers" not in name]
                sums[file.stem] = sum(tensors.get_tensor(name).double().abs().sum().item() for name in names)
    return sums


def inputs_of(graph: dict) -> dict:
    return {number: node["inputs"] for number, node in graph.items()}


def jobs_of(server, name: str) -> list[dict]:
    """What a workflow in API format, as it is, asks the ranks for: see comfy_nodes/recording.py."""
    graph = api(name)
    server.post("/tests/recording", {"on": True})
    try:
        answer = server.post("/prompt", {"prompt": graph})
        assert answer["node_errors"] == {}
        ran = server.wait(answer["prompt_id"])["prompt"][2]
    finally:
        jobs = server.post("/tests/recording", {"on": False})
    assert inputs_of(ran) == inputs_of(graph), "validation has changed a value"
    return sorted(jobs, key=lambda job: (job["job"], job["fields"].get("text", "")))


def latent_of(server, name: str) -> torch.Tensor:
    """What the sampler of a workflow in API format makes [B,C,T,H,W], of random models in less time than as saved."""
    graph = api(name)
    graph[SAVE] = graphs.save_latent([SAMPLER, 0])
    del graph[DECODE], graph[VIDEO]
    if not name.startswith("tiny_wan"):
        graph[SAMPLER]["inputs"]["steps"] = STEPS
        for node in graph.values():
            if "length" in node["inputs"]:
                node["inputs"] |= SMALL
    return graphs.saved_latent(server, server.queue(graph), SAVE)


@pytest.fixture(scope="module")
def saved(comfyui):
    """The `comfyui` with what the workflows name."""
    write_inputs(comfyui.base)
    return comfyui


def made(file: str) -> dict:
    return json.loads((SAVED / file).read_text())


def alike(then, now) -> bool:
    """Equal, but fractions nearly: images are scaled, and seen by CLIP, whose sums differ between processors."""
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and not any(differences(*pair, "") for pair in zip(then, now))
    if isinstance(then, float) and isinstance(now, float):
        return math.isclose(then, now, rel_tol=1e-3, abs_tol=1e-4)
    return type(then) is type(now) and then == now


def differences(then, now, where: str) -> list[str]:
    """What differs between two answers of comfy_nodes/recording.py. Fields that came later must have their default. A
    stored fsdp of False, the widget's default, has come to mean automatic."""
    if where.endswith(".parallel.fields.fsdp") and (then, now) == (False, None):
        return []
    if not isinstance(then, dict) or not isinstance(now, dict):
        return [] if alike(then, now) else [f"{where}: {then} has become {now}"]
    later = now.get("fields", {}).keys() - then.get("fields", {}).keys() - set(now.get("defaults", ())) - SOURCES
    found = [f"{where}: {name} came later and is not its default" for name in later]
    for key in then.keys() - {"defaults"}:
        found += differences(then[key], now[key], f"{where}.{key}") if key in now else [f"{where}: {key} is gone"]
    return found


def test_an_api_format_asks_the_ranks_for_the_same(saved, name):
    """Unchanged, it is accepted, and each of its values reaches the ranks."""
    then, now = made("jobs.json")[name], jobs_of(saved, name)
    assert [job["job"] for job in now] == [job["job"] for job in then]
    assert [text for jobs in zip(then, now) for text in differences(*jobs, jobs[0]["job"])] == []


def test_random_models_are_those_of_the_saved_latents(saved):
    assert weights(saved.base) == pytest.approx(made("weights.json"), rel=1e-5)


def test_an_api_format_makes_the_same_latent(saved, name):
    then, now = load_file(SAVED / "latents.safetensors")[name], latent_of(saved, name)
    tolerance = TOLERANCE if name.startswith("tiny_wan") else TOLERANCE_OF_RANDOM_MODELS
    assert now.shape == then.shape
    assert (now - then).abs().max() <= tolerance * then.abs().max()


@pytest.fixture(scope="module")
def browser(saved):
    with ComfyBrowser(saved) as browser:
        yield browser


@pytest.fixture
def errors(browser):
    """What the page raises during a test."""
    raised = []

    def note(error):
        raised.append(str(error))

    browser.page.on("pageerror", note)
    yield raised
    browser.page.remove_listener("pageerror", note)


@pytest.fixture(scope="module")
def known(saved) -> dict:
    """The nodes of this ComfyUI, by their type."""
    return saved.get("/object_info")


def default_of(node: dict, name: str):
    """What ComfyUI's page gives an input that a saved workflow does not have; node: as /object_info describes it."""
    form, *options = (node["input"].get("required", {}) | node["input"].get("optional", {}))[name]
    options = options[0] if options else {}
    choices = form if isinstance(form, list) else options.get("options", [None])
    return options.get("default", choices[0])


def links_of(workflow: dict) -> set:
    """Of a graph in UI format: (from which node, which output, to which node, its input's name, type)."""
    inputs = {node["id"]: node.get("inputs", []) for node in workflow["nodes"]}
    return {(source, output, target, inputs[target][slot]["name"], kind)
            for _, source, output, target, slot, kind in workflow["links"]}  # fmt: skip


def widgets_of(workflow: dict) -> dict:
    """Of a graph in UI format, by node: its type, and its widgets' values in their order."""
    return {node["id"]: (node["type"], node.get("widgets_values", [])) for node in workflow["nodes"]}


def without_later_inputs(prompt: dict, saved: dict, known: dict) -> dict:
    """{node: (type, inputs)} of a page's prompt, without inputs that `saved` has not and that have their default."""
    left = {}
    for number, node in prompt.items():
        kind, before = node["class_type"], saved.get(number, {"inputs": {}})["inputs"]
        left[number] = kind, {
            name: value for name, value in node["inputs"].items()
            if name in before or value != default_of(known[kind], name)
        }  # fmt: skip
    return left


@pytest.mark.skipif(not chromium(), reason="no chromium in PATH; `apt-get install chromium` brings it")
def test_a_workflow_opens_with_every_value(browser, errors, known, name):
    """In ComfyUI's page, node by node; and it becomes the API format that was shipped with it."""
    workflow, prompt = ui(name), api(name)
    browser.open(workflow)
    shown, before = browser.graph(), widgets_of(workflow)
    assert errors == [] and browser.page.locator("[role=dialog]").all_inner_texts() == []
    assert {kind for kind, _ in widgets_of(shown).values()} <= {*known, *NOTES}, "nodes are missing"
    assert links_of(shown) == links_of(workflow)
    now = {number: (kind, values[: len(before[number][1])]) for number, (kind, values) in widgets_of(shown).items()}
    assert now == before
    queued = without_later_inputs(browser.prompt(), prompt, known)
    assert queued == {number: (node["class_type"], node["inputs"]) for number, node in prompt.items()}
