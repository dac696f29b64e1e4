"""25 things that a ComfyUI user wants to do with the pack, each done in the real page, classic and Nodes 2.0.

In CI a few of them; --all-pages does all, and leaves a picture of each in .cache/artefacts/tasks, to be looked at.
ASCEND_TEST_PICTURES names another folder, and ASCEND_TEST_TASKS some of the tasks, separated by spaces.
"""

import json
import os
import re
from pathlib import Path

import published_models
import pytest
import random_lora
from comfy_graphs import saved
from comfy_user import User
from PIL import Image
from safetensors.torch import load_file
from scripts.lib.comfy_browser import MISSING_MODELS, NODES_2, ComfyBrowser, chromium
from scripts.lib.comfy_server import PromptFailed

REPOSITORY = Path(__file__).resolve().parents[2]
PICTURES = Path(os.environ.get("ASCEND_TEST_PICTURES") or REPOSITORY / ".cache" / "artefacts" / "tasks")
TINY = "tiny_wan_text_to_video"
CHINESE = re.compile("[\u4e00-\u9fff]")
TASKS = {}
SAMPLE = ("bare_sampler_looks_right", "read_an_error")  # in CI, in classic mode

pytestmark = pytest.mark.skipif(
    not chromium(), reason="no chromium in PATH; `apt-get install chromium fonts-wqy-zenhei` brings it"
)


def task(do):
    TASKS[do.__name__] = do
    return do


@pytest.fixture(scope="module")
def users(comfyui):
    """`users(nodes_2)`: the user of one page, in this mode."""
    folder, own = comfyui.base / "models", REPOSITORY / "assets" / "tiny_wan" / "transformer"
    weights = own / "diffusion_pytorch_model.safetensors"
    (folder / "loras").mkdir(exist_ok=True)
    random_lora.save(folder / "loras" / "my_style.safetensors", "kohya", load_file(weights), seed=1)
    (folder / "diffusion_models" / "half.safetensors").write_bytes(weights.read_bytes()[:100_000])
    Image.new("RGB", (120, 80), "orange").save(comfyui.base / "input" / "example.png")
    with ComfyBrowser(comfyui) as browser:
        made = {}

        def user(nodes_2) -> User:
            if list(made) != [nodes_2]:
                made.clear()
                made[nodes_2] = User(browser, nodes_2, PICTURES)
            return made[nodes_2]

        yield user
        user(False).setting(NODES_2, False)


@pytest.mark.parametrize("mode", ["classic", "nodes2"])
def test_tasks(users, mode, request):
    """All that fail are listed, with why."""
    every, failed = request.config.getoption("--all-pages"), {}
    if mode == "nodes2" and not every:
        pytest.skip("--all-pages runs it")
    assert len(TASKS) >= 25
    wanted = os.environ.get("ASCEND_TEST_TASKS", "").split() or list(TASKS)
    for name in wanted if every else SAMPLE:
        user = users(mode == "nodes2")
        user.clear()
        try:
            TASKS[name](user)
        except (Exception, pytest.fail.Exception) as problem:
            failed[name] = f"{type(problem).__name__}: {str(problem)[:400]}"
        user.picture(name)
        print(f"{mode} {name}: {failed.get(name, 'done')}", flush=True)
    assert failed == {}


# Finding and understanding


def found_by(words, name):
    def do(user):
        listed = user.search(words)
        assert any(name in one for one in listed), f"{words}: {listed[:20]}"

    return do


TASKS["find_by_npu"] = found_by("npu", "Ascend")
TASKS["find_by_multi_gpu"] = found_by("multi gpu", "Ascend Parallel Config")
TASKS["find_by_teacache"] = found_by("teacache", "Ascend Step Cache")


@task
def find_the_sampler_by_wan(user):
    assert "Ascend Sampler" in user.search("wan sampler")[:4]
    user.page.keyboard.press("Escape")
    found = user.page.evaluate("""words => document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
        ._s.get('nodeDef').nodeSearchService.searchNode(words).map(node => node.display_name)""", "wan")
    assert "Ascend Sampler" in found and "Ascend Load Diffusion Model" in found  # core has a dozen nodes of this name
    user.search("wan sampler")


@task
def bare_sampler_looks_right(user):
    user.add("AscendSampler")
    user.look_at("AscendSampler", margin=150)
    widgets = user.widgets("AscendSampler")
    assert set(widgets) <= {"seed", "steps", "cfg", "sampler_name", "scheduler", "shift"} and len(widgets) <= 7
    if user.mode == "classic":
        assert [shown for name, (_, shown) in widgets.items() if name in ("steps", "cfg", "shift")] == ["auto"] * 3


@task
def see_which_link_is_what(user):
    user.template(TINY)
    colours = user.page.evaluate("""() => app.graph.nodes.flatMap(n => n.outputs ?? []).map(output =>
        [output.type, app.canvas.default_connection_color_byType?.[output.type]
                      ?? LGraphCanvas.link_type_colors[output.type] ?? ''])""")
    ours = {kind: colour for kind, colour in colours if kind.startswith("ASCEND")}
    assert len(ours) >= 4 and all(ours.values()) and len(set(ours.values())) == len(ours), ours


@task
def read_the_help(user):
    user.add("AscendSampler")
    user.look_at("AscendSampler", margin=250)
    user.page.evaluate("app.canvas.selectNode(app.graph.nodes[0])")
    user.page.get_by_test_id("info-button").click()
    user.page.get_by_role("heading", name="Published settings").wait_for()


@task
def browse_the_templates(user):
    user.command("Comfy.BrowseTemplates")
    user.page.get_by_text("ascend-video", exact=True).first.click()
    user.page.get_by_text("A first video - Tiny Wan", exact=False).first.wait_for()
    user.page.wait_for_timeout(2000)
    user.picture("templates_open")
    user.page.get_by_text("A first video - Tiny Wan", exact=False).first.click()
    user.wait_for("AscendSampler", "SaveVideo")
    user.fit()


@task
def see_which_models_are_missing(user):
    user.setting(MISSING_MODELS, True)
    text = (REPOSITORY / "workflows" / "HunyuanVideo - text to video.json").read_text()
    workflow = json.loads(re.sub(r"\b(hunyuan_video_|llava_)", r"absent_\1", text))  # others may be there
    user.page.evaluate("workflow => { app.loadGraphData(workflow) }", workflow)
    try:
        for name in ("hunyuan_video_t2v_720p_bf16", "llava_llama3_fp8_scaled"):
            user.page.get_by_text(name).first.wait_for()
        user.page.wait_for_timeout(500)
        user.picture("missing_models_dialog")
    finally:
        user.setting(MISSING_MODELS, False)
        user.page.keyboard.press("Escape")


# Making videos


@task
def make_a_first_video(user):
    user.template(TINY)
    user.run()
    assert user.video()[:2] == [64, 64]


@task
def read_what_it_cost(user):
    user.template(TINY)
    user.set("AscendSampler", steps=4, control_after_generate="fixed")
    user.run()
    said = user.report()
    assert re.search(r"took .*\d s: .*sampling", said), said
    user.look_at("AscendSampler", "AscendVAEDecode")


@task
def make_it_longer(user):
    user.template(TINY)
    user.set("AscendSampler", steps=2)
    user.set("AscendVideoSize", seconds=2.0)
    user.run()
    assert abs(user.video()[2] - 33 / 16) < 0.1


@task
def switch_to_four_steps(user):
    user.template(TINY)
    user.set("AscendSampler", steps=4, cfg=1.0)
    assert user.run()["prompt"][2][str(user.node("AscendSampler"))]["inputs"]["steps"] == 4
    assert user.report()


@task
def change_the_seed_and_run_again(user):
    user.template(TINY)
    user.set("AscendSampler", steps=2, seed=1, control_after_generate="increment")
    first, second = user.run(), user.run()
    assert [entry["prompt"][2]["8"]["inputs"]["seed"] for entry in (first, second)] == [1, 2]


@task
def change_the_prompt(user):
    user.template(TINY)
    user.set("AscendTextEncode", text="a green triangle moving up on a black background")
    user.set("AscendSampler", steps=8)
    user.run()
    assert user.video()


@task
def cancel_and_continue(user):
    user.template(TINY)
    user.set("AscendSampler", steps=900)
    prompt = user.start()
    user.page.wait_for_timeout(4000)
    user.picture("cancel_running")
    user.command("Comfy.Interrupt")
    with pytest.raises(PromptFailed) as caught:
        user.comfyui.wait(prompt, timeout=60)
    assert caught.value.kind == "execution_interrupted"
    user.set("AscendSampler", steps=3)
    user.run()
    assert user.video()


@task
def use_an_accelerator(user):
    user.template("tiny_wan_fast_text_to_video")
    user.run()
    assert re.search("skipp|saved|reus|faster|left out", user.report()), user.report()
    user.look_at("AscendSampler", "AscendStepCache", "AscendRainFusion")


@task
def use_my_own_lora(user):
    user.template(TINY)
    lora = user.add("AscendLoadLora", 380, 560)
    user.set("AscendLoadLora", lora_name="my_style.safetensors", strength=0.8)
    user.link(user.node("AscendLoadDiffusionModel"), lora, "model")
    user.link(lora, user.node("AscendSampler"), "model")
    user.set("AscendSampler", steps=2)
    user.run()
    assert user.video()
    user.look_at("AscendLoadDiffusionModel", "AscendLoadLora", "AscendSampler")


@task
def make_a_video_of_an_image(user):
    published_models.write_all(user.comfyui.base / "models")
    user.browser.reload()  # which lists the new files
    user.template("wan2.2_i2v_a14b_image_to_video")
    user.set("AscendImageToVideo", width=96, height=64, length=9)
    if user.has("AscendVideoSize"):
        user.set("AscendVideoSize", width=96, height=64, seconds=0.5)
    user.set("AscendParallelConfig", ranks=1)
    user.set("AscendSampler", steps=2)
    user.run()
    assert user.video()[:2] == [96, 64]


@task
def two_samplers_in_a_row(user):
    user.template(TINY)
    single, encoders = user.node("AscendSampler"), [user.node("AscendTextEncode", number) for number in (0, 1)]
    first, second = user.add("AscendSamplerAdvanced", 1700, 900), user.add("AscendSamplerAdvanced", 2100, 900)
    for number, one in enumerate((first, second)):
        user.link(user.node("AscendLoadDiffusionModel"), one, "model")
        user.link(encoders[0], one, "positive")
        user.link(encoders[1], one, "negative")
        user.set("AscendSamplerAdvanced", number, steps=4, noise_seed=1)
    user.link(user.node("AscendVideoSize"), first, "latent_image")
    user.link(first, second, "latent_image")
    user.set("AscendSamplerAdvanced", 0, end_at_step=2, return_with_leftover_noise="enable")
    user.set("AscendSamplerAdvanced", 1, start_at_step=2, add_noise="disable")
    user.link(second, user.node("AscendVAEDecode"), "samples")
    user.page.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", single)
    user.run()
    assert user.video()
    user.look_at("AscendSamplerAdvanced")


@task
def free_the_memory(user):
    user.template(TINY)
    user.set("AscendSampler", steps=2)
    user.run()
    user.command("Comfy.Memory.UnloadModels")
    user.page.wait_for_timeout(1500)
    user.picture("free_memory_said")
    user.run()
    assert user.video()


@task
def drag_a_video_back(user):
    user.template(TINY)
    user.set("AscendSampler", steps=2, seed=77, control_after_generate="fixed")
    user.run()
    (prompt,) = [key for key, entry in list(user.comfyui.get("/history").items())[-1:]]
    file = saved(user.comfyui, prompt)
    user.clear()
    user.drop(file, "video/mp4")
    user.wait_for("AscendSampler", "SaveVideo")
    assert user.widgets("AscendSampler")["seed"][0] == 77
    user.fit()


@task
def see_the_plan(user):
    user.template(TINY)
    user.set("AscendParallelConfig", ranks=2)
    user.set("AscendSampler", steps=2)
    user.run()
    said = user.report()
    assert re.search(r"2 (processes|ranks|devices)", said), said
    user.look_at("AscendSampler", "AscendParallelConfig")


@task
def swap_the_loaders_of_a_stock_graph(user):
    stock = {"1": {"class_type": "UNETLoader", "inputs": {"unet_name": "original_wan.safetensors",
                                                         "weight_dtype": "default"}}}  # fmt: skip
    user.browser.open(stock)
    user.fit()
    user.choose("Swap loaders to run on all ranks", "swap_menu")
    user.wait_for("AscendUNETLoader")


# When something is wrong


@task
def read_an_error(user):
    user.template(TINY)
    user.set("AscendLoadDiffusionModel", model_name="half.safetensors")
    with pytest.raises(PromptFailed, match="AV-1302"):
        user.run()
    shows = user.page.locator("[data-node-id]").get_by_text("Error", exact=True)  # a button in newer Nodes 2.0
    if shows.count():
        shows.first.click()
    user.page.get_by_text("AV-1302").first.wait_for(timeout=20_000)


@task
def a_wrong_size_is_corrected(user):
    user.template(TINY)
    user.set("AscendVideoSize", width=75, height=64)
    assert user.widgets("AscendVideoSize")["width"][0] in (64, 80)


@task
def cores_decoder_takes_no_vae_of_ours(user):
    user.template(TINY)
    core = user.add("VAEDecode", 1700, 700)
    with pytest.raises(Exception, match="no link from AscendLoadVAE to vae"):  # the page draws the sockets apart
        user.link(user.node("AscendLoadVAE"), core, "vae")
    user.look_at("AscendLoadVAE", "VAEDecode")


@task
def see_it_all_in_chinese(user):
    user.setting("Comfy.Locale", "zh")
    user.browser.reload()
    user.page.wait_for_timeout(3000)  # newer pages open the last workflow again
    try:
        user.template(TINY)
        user.set("AscendSampler", steps=2)
        user.run()
        assert CHINESE.search(user.report()), user.report()
        user.picture("chinese_whole")
        user.look_at("AscendSampler", "AscendVAEDecode")
        user.picture("chinese_report")
    finally:
        user.setting("Comfy.Locale", "en")
        user.browser.reload()
