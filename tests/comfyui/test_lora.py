"""Ascend Load LoRA beside core ComfyUI's LoRA loader, in the same ComfyUI; and what it refuses."""

import json

import comfy_graphs as graphs
import pytest
import random_lora
import torch
from ascend_runtime.models.wan.files.names import to_diffusers_name
from comfy_listener import Listener
from core_twin import MODEL, TOLERANCE, both
from scripts.lib.comfy_server import PromptFailed, PromptRejected
from safetensors.torch import load_file, save_file

LORAS = {"kohya": 0.6, "lightx2v": -0.8, "original": 0.5}  # with their strengths


@pytest.fixture(scope="module")
def loras(comfyui):
    """A random LoRA of each layout in models/loras, and a broken one.

    None changes a modulation, which core leaves as it is: it patches no parameter of a module that has others within.
    """
    folder = comfyui.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(comfyui.base / "models" / "diffusion_models" / MODEL)
    parameters = {to_diffusers_name(name): tensor for name, tensor in tensors.items()}
    for seed, layout in enumerate(LORAS):
        file = folder / f"{layout}.safetensors"
        random_lora.save(file, layout, parameters, seed=seed)
        modulation = (".diff_m", "modulation.diff")
        save_file({key: tensor for key, tensor in load_file(file).items() if not key.endswith(modulation)}, file)
    (folder / "broken.safetensors").write_bytes(b"\x00" * 20)
    return {f"{layout}.safetensors": strength for layout, strength in LORAS.items()}


def with_loras(graph: dict, loras: dict[str, float], **more) -> dict:
    """The graph with these LoRAs between our loader and our sampler, and likewise in core's part if it has one."""
    source, core_source = graphs.MODEL, "20"
    for number, (name, strength) in enumerate(loras.items()):
        inputs = {"model": [source, 0], "lora_name": name, "strength": strength, **more}
        source = f"ours {number}"
        graph[source] = {"class_type": "AscendLoadLora", "inputs": inputs}
        if "20" in graph:
            inputs = {"model": [core_source, 0], "lora_name": name, "strength_model": strength}
            core_source = f"core {number}"
            graph[core_source] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
            graph["21"]["inputs"]["model"] = [core_source, 0]
    graph[graphs.SAMPLER]["inputs"]["model"] = [source, 0]
    return graph


@pytest.mark.parametrize("names", [["kohya"], ["lightx2v"], ["kohya", "lightx2v", "original"]], ids="+".join)
def test_core_and_ours_give_the_same_latent(comfyui, loras, names):
    chosen = {f"{name}.safetensors": loras[f"{name}.safetensors"] for name in names}
    prompt = comfyui.queue(with_loras(both(4, 1.0, 5.0, seed=3), chosen))
    core, ours = (graphs.saved_latent(comfyui, prompt, node) for node in ("core", "ours"))
    plain = graphs.saved_latent(comfyui, comfyui.queue(both(4, 1.0, 5.0, seed=3)), "ours")
    error, change = (core - ours).abs().max().item(), (ours - plain).abs().max().item()
    print(f"{names}: at most {error:.1e} apart, the LoRA changes up to {change:.2f}")
    assert error <= TOLERANCE and change > 100 * TOLERANCE


def test_pefts_folder_is_one_lora(comfyui, loras):
    """With the alpha of its configuration; the file in it is not listed, but workflows that name it still run."""
    folder = comfyui.base / "models" / "loras" / "peft" / "style"
    folder.mkdir(parents=True)
    tensors = {key: x for key, x in load_file(folder.parents[1] / "original.safetensors").items() if "lora_" in key}
    rank = next(iter(x.shape[0] for key, x in tensors.items() if key.endswith("lora_A.weight")))
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank}))
    save_file(tensors, folder / "other.safetensors")
    schema = comfyui.get("/object_info/AscendLoadLora")["AscendLoadLora"]["input"]["required"]["lora_name"]
    listed = schema[0] if isinstance(schema[0], list) else schema[1]["options"]
    assert {"peft/style", "peft/style/other.safetensors"} == {name for name in listed if name.startswith("peft")}
    chosen = {"peft/style": 0.5, "peft/style/adapter_model.safetensors": 0.5, "peft/style/other.safetensors": 1.0}
    queued = [comfyui.queue(with_loras(both(2, 1.0, 5.0, seed=4), {name: x})) for name, x in chosen.items()]
    whole, file, twice = (graphs.saved_latent(comfyui, one, "ours") for one in queued)
    assert torch.equal(whole, file) and (whole - twice).abs().max() <= TOLERANCE


def test_what_is_left_out_is_shown_at_the_sampler_and_once_in_the_log(comfyui, loras):
    """Not once a rank, of which there are two, nor once a job."""
    folder = comfyui.base / "models" / "loras"
    name = "misfit.safetensors"
    whole = {f"diffusion_model.blocks.0.self_attn.q.{part}.weight": torch.ones(shape)
             for part, shape in (("lora_A", (2, 96)), ("lora_B", (96, 2)))}  # fmt: skip
    save_file(whole | {"diffusion_model.patch_embedding.diff": torch.ones(96, 36, 1, 2, 2)}, folder / name)
    for seed in (11, 12):
        with Listener(comfyui) as listener:
            run = listener.run(with_loras(graphs.latent(seed=seed), {name: 0.5}))
        (said,) = run.of("executed", graphs.SAMPLER)[-1].data["output"]["text"]
        assert f"{name} is used without some of its tensors: 1 of the wrong shape" in said
        assert "made for an image-to-video model (36 channels); this is a text-to-video model (16" in said
    assert comfyui.log.count("is used without some of its tensors") == 1


def test_a_prompt_that_is_cut_says_so_at_its_node_and_in_the_log(comfyui):
    graph = graphs.latent(seed=13)
    graph[graphs.POSITIVE]["inputs"]["text"] = "red circle " * 300
    with Listener(comfyui) as listener:
        run = listener.run(graph)
    (said,) = run.of("executed", graphs.POSITIVE)[-1].data["output"]["text"]
    assert "tokens, but Wan reads 512: the text after '... " in said and said.removeprefix("Warning: ") in comfyui.log
    graph[graphs.POSITIVE]["inputs"]["text"] = "red circle " * 10_000
    with pytest.raises(PromptFailed, match="The prompt has 110,000 characters; at most 50,000 are accepted"):
        comfyui.wait(comfyui.queue(graph))


def test_a_lora_that_is_not_there(comfyui, loras):
    with pytest.raises(PromptRejected) as caught:
        comfyui.queue(with_loras(graphs.latent(), {"no_such_lora": 1.0}))
    (error,) = caught.value.body["node_errors"]["ours 0"]["errors"]
    assert "There is no model 'no_such_lora'" in error["details"] and "models/loras" in error["details"]
    assert "kohya.safetensors" in error["details"]


@pytest.mark.parametrize("name, expert, says", [
    ("broken.safetensors", "both", "is not a complete .safetensors file"),
    ("kohya.safetensors", "both", "of the wrong shape"),  # another model's
    ("kohya.safetensors", "low_noise", "this model has only one expert"),
])  # fmt: skip
def test_one_that_cannot_be_merged_fails_the_job(comfyui, loras, name, expert, says):
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(with_loras(graphs.latent(seed=7), {name: 1.0}, expert=expert)))
    assert caught.value.details["exception_type"] == "ValueError"
    assert says in caught.value.details["exception_message"] and name in caught.value.details["exception_message"]
