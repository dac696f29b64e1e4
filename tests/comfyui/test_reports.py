"""What nodes say of their last run, in the page's language: samplers, VAE Decode and Text Encode."""

import re
import shutil
from pathlib import Path

import comfy_graphs as graphs
import pytest
from comfy_listener import Listener
from page_scripts import FIT, REPORTS, SET
from shipped_workflows import ui
from scripts.lib.comfy_browser import NODES_2, ComfyBrowser

SCREENSHOTS = Path(__file__).resolve().parents[2] / ".cache" / "artefacts"
TIME = r"\d[\d.]* (s|秒)"


def reports(comfyui, graph) -> dict:
    """What nodes put out for their reports: {node: {language: text}}."""
    with Listener(comfyui) as listener:
        run = listener.run(graph)
    outputs = {event.data["node"]: event.data["output"] for event in run.of("executed") if event.data["output"]}
    found = {node: one["ascend_report"][0] for node, one in outputs.items() if "ascend_report" in one}
    assert all(outputs[node]["text"] == [texts["en"]] for node, texts in found.items())
    return found


def test_a_video_says_how_it_was_made_and_what_it_took(comfyui, rng):
    graph = graphs.video(seed=rng.randrange(2**32), steps=6)
    graph["90"] = {"class_type": "AscendAttentionCache", "inputs": {"preset": "custom", "start": 1, "end": 5}}
    graph[graphs.SAMPLER]["inputs"]["acceleration"] = ["90", 0]
    found = reports(comfyui, graph)
    english, chinese = (found[graphs.SAMPLER][language].splitlines() for language in ("en", "zh"))
    print("\n".join(english + chinese))
    assert english[0] == ("2 processes on the CPU share each step: one computes the prompt, the other the negative "
                          "prompt.")  # fmt: skip
    assert chinese[0] == "2 个 CPU 进程共同计算每一步：一个算正面提示词，一个算负面提示词。"
    assert re.fullmatch(rf"Took {TIME}: .*6 steps {TIME} \({TIME} each; predicted {TIME} in all\)\.", english[2])
    assert re.fullmatch(rf"用时 {TIME}：.*6 步 {TIME}（每步 {TIME}，预计共 {TIME}）。", chinese[2])
    assert english[3].startswith("AttentionCache: 3 of 6 steps reused earlier results; ")
    assert chinese[3].startswith("AttentionCache：6 步中有 3 步复用了之前的结果，")
    assert re.match(rf"The video took {TIME}", found[graphs.DECODE]["en"])
    assert re.match(rf"整个视频用时 {TIME}", found[graphs.DECODE]["zh"])


def test_the_second_of_two_samplers_counts_the_first_and_says_that_its_solver_started_over(comfyui, rng):
    size = {"size": 160, "length": 17}  # whose first steps take long enough to be worth a word
    graph = graphs.latent(seed=rng.randrange(2**32), steps=6, sampler_name="unipc", **size)
    inputs = graph[graphs.SAMPLER]["inputs"]
    inputs["noise_seed"] = inputs.pop("seed")
    first, second = ({"start_at_step": 0, "end_at_step": 4, "add_noise": "enable",
                      "return_with_leftover_noise": "enable"},
                     {"start_at_step": 4, "end_at_step": 99, "add_noise": "disable",
                      "return_with_leftover_noise": "disable", "latent_image": ["92", 0]})  # fmt: skip
    graph["91"] = {"class_type": "AscendSamplerAdvanced", "inputs": inputs | first}
    graph["92"] = {"class_type": "LatentMultiply", "inputs": {"samples": ["91", 0], "multiplier": 1.0}}
    graph[graphs.SAMPLER] = {"class_type": "AscendSamplerAdvanced", "inputs": inputs | second}
    found = reports(comfyui, graph)
    print(found)
    assert re.search(rf"steps 1 to 4 of 6 {TIME} \({TIME} each", found["91"]["en"])
    assert re.search(rf"earlier steps {TIME}, steps 5 to 6 of 6 {TIME} \({TIME} each", found[graphs.SAMPLER]["en"])
    assert "The solver started over at step 5" in found[graphs.SAMPLER]["en"]
    assert "求解器从第 5 步重新开始" in found[graphs.SAMPLER]["zh"] and "6 步中的第 5～6 步" in found[graphs.SAMPLER]["zh"]
    inputs |= {"start_at_step": 6, "end_at_step": 6, "add_noise": "disable", "return_with_leftover_noise": "disable"}
    (nothing,) = [texts for node, texts in reports(comfyui, graph | {"91": {**graph["91"], "inputs": inputs}}).items()
                  if node == "91"]  # fmt: skip
    assert nothing == {"en": "No step was computed: start_at_step is 6, end_at_step 6, steps 6.",
                       "zh": "没有计算任何步：起始步为 6，结束步为 6，步数为 6。"}  # fmt: skip


def test_warnings_of_a_prompt_are_at_its_node(comfyui):
    graph = graphs.latent(seed=17)
    graph[graphs.POSITIVE]["inputs"]["text"] = "red circle " * 290
    graph[graphs.NEGATIVE]["inputs"]["text"] = "nothing to say of this one"
    found = reports(comfyui, graph)
    assert found[graphs.POSITIVE]["zh"].startswith("警告：") and found[graphs.POSITIVE]["en"].startswith("Warning: ")
    assert found[graphs.NEGATIVE] == {"en": "", "zh": ""}


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("chromium-browser")), reason="no chromium in PATH")
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_a_chinese_page_shows_reports_in_chinese(comfyui, rng, nodes_2):
    seed = rng.randrange(2**32)
    comfyui.post(f"/settings/{NODES_2}", nodes_2)
    try:
        with ComfyBrowser(comfyui, locale="zh") as browser:
            browser.open(ui("tiny_wan_text_to_video"))
            browser.page.evaluate(SET, {"AscendSampler": {"steps": 2, "seed": seed},
                                        "AscendParallelConfig": {"ranks": 2}})  # fmt: skip
            browser.page.evaluate(FIT)  # what is out of sight is not drawn
            browser.page.keyboard.press("Control+Enter")
            browser.page.wait_for_function(f"{REPORTS}.length == 2", timeout=100_000)
            browser.page.wait_for_timeout(500)
            sampler, decode = sorted(browser.page.evaluate(REPORTS), key=len, reverse=True)
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            browser.page.screenshot(path=SCREENSHOTS / f"report_zh_{'nodes_2' if nodes_2 else 'classic'}.png")
            assert sampler.startswith("2 个 CPU 进程共同计算每一步") and decode.startswith("整个视频用时")
            assert not re.search("[a-z]{2}", sampler.replace("unipc", "") + decode)
            assert all(fit(browser.page)), "a report does not fit"
    finally:
        comfyui.post(f"/settings/{NODES_2}", False)


def fit(page) -> list[bool]:
    """Whether each report can be read without scrolling."""
    return page.evaluate("[...document.querySelectorAll('.ascend-report')].map(r => r.scrollHeight <= r.clientHeight)")
