"""The nodes that make the templates short: Ascend Video Size, and the switch for LoRAs of few steps."""

import random

import comfy_graphs as graphs
import pytest
from ascend_runtime import VideoSize

SEED = random.randrange(2**32)


def test_seconds_become_the_nearest_number_of_frames():
    draw = random.Random(SEED)
    for _ in range(300):
        seconds, fps = round(draw.uniform(0, 20), 3), draw.choice([12, 16, 23.976, 24, 30])
        made = VideoSize.of_seconds(64, 48, seconds, fps).num_frames
        others = [made - 4, made + 4]
        assert made % 4 == 1 and made >= 1, (SEED, seconds, fps)
        # The first frame is the moment 0, so 4n+1 frames last 4n intervals.
        assert all(abs((made - 1) / fps - seconds) <= abs((other - 1) / fps - seconds) + 1e-9 for other in others
                   if other > 0), (SEED, seconds, fps)  # fmt: skip
    known = {(5.0, 16): 81, (5.0, 24): 121, (5.3, 24): 129, (1.0, 16): 17, (0.0, 16): 1}
    assert {key: VideoSize.of_seconds(832, 480, *key).num_frames for key in known} == known


def test_the_node_gives_core_its_latent_and_numbers(comfyui):
    size = {"class_type": "AscendVideoSize", "inputs": {"width": 96, "height": 64, "seconds": 0.8, "fps": 12.0}}
    graph = {"1": size, "2": graphs.save_latent(["1", 0])}
    for output in range(1, 5):
        graph[str(output + 2)] = {"class_type": "PreviewAny", "inputs": {"source": ["1", output]}}
    prompt = comfyui.queue(graph)
    latent = graphs.saved_latent(comfyui, prompt, "2")
    assert latent.shape == (1, 16, 3, 8, 12) and not latent.any()
    outputs = comfyui.wait(prompt)["outputs"]
    assert [float(outputs[str(node)]["text"][0]) for node in range(3, 7)] == [96, 64, 9, 12]


@pytest.mark.parametrize("changes, said", [
    ({"width": 72}, "64 and 80"),
    ({"width": 8192, "height": 8192, "seconds": 20.0}, "are 321 frames. 8192x8192 x 321 frames exceed"),
    ({"seconds": 500.0}, "500 seconds at 16 frames per second are 8001 frames"),
])  # fmt: skip
def test_a_size_that_no_model_makes_is_refused(comfyui, changes, said):
    inputs = {"width": 96, "height": 64, "seconds": 1.0, "fps": 16.0, **changes}
    graph = {"1": {"class_type": "AscendVideoSize", "inputs": inputs}, "2": graphs.save_latent(["1", 0])}
    assert said in graphs.refusal(comfyui, graph, "1")


def test_a_switch_that_is_off_needs_no_lora(comfyui):
    graph = graphs.latent(steps=2)
    inputs = {"few_steps": False, "lora_name": "gone.safetensors", "low_noise_lora_name": "gone_too.safetensors",
              "model": [graphs.MODEL, 0]}  # fmt: skip
    graph["20"] = {"class_type": "AscendFewStepLora", "inputs": inputs}
    graph[graphs.SAMPLER]["inputs"]["model"] = ["20", 0]
    plain = graphs.latent(steps=2)
    made = [graphs.saved_latent(comfyui, comfyui.queue(one)) for one in (graph, plain)]
    assert (made[0] == made[1]).all() and made[0].std() > 0.1
    graph["20"]["inputs"]["few_steps"] = True
    assert "There is no model 'gone.safetensors'" in graphs.refusal(comfyui, graph, "20")
