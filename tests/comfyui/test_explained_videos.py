"""A video explains itself: what its file says of the jobs that made it, and `explain` on a host with the same models,
and with others."""

import shutil
import socket
from argparse import Namespace
from pathlib import Path

import comfy_graphs as graphs
import pytest
import random_lora
from ascend_runtime.checkpoints.digest import file_digest
from ascend_runtime.commands.explanation import command, metadata
from ascend_runtime.specs.record import DECODE, DENOISE, ENCODE, KEY
from safetensors.torch import load_file
from stock_graphs import Graph, loaded, parallel, sampled

SECOND_SAMPLER, SECOND_DECODE, SECOND_VIDEO, SECOND_SAVE = "20", "21", "22", "23"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def explain(comfyui, capsys):
    """`explain(file, models)`: the exit status, and what it prints."""

    def explained(file: Path, models: Path | None = None) -> tuple[int, str]:
        folder = models or comfyui.base / "models"
        capsys.readouterr()
        status = command.run(Namespace(file=str(file), models=[str(folder)], json=False))
        return status, capsys.readouterr().out

    return explained


def made(comfyui, graph: dict, node: str = graphs.SAVE) -> Path:
    return graphs.saved(comfyui, comfyui.queue(graph), node)


def jobs_in(file: Path) -> dict:
    """The last job of each kind in a file's metadata."""
    return {job.kind: job for job in metadata.read(file).record.jobs}


def files_in(job) -> set:
    return {file for part in job.parts for file in part.files}


def two_videos(**second) -> dict:
    """A graph with two samplers, each with its own file."""
    graph = graphs.video(seed=11)
    graph[SECOND_SAMPLER] = {**graph[graphs.SAMPLER], "inputs": {**graph[graphs.SAMPLER]["inputs"], **second}}
    for node, name, source, own in (
        (graphs.DECODE, "samples", SECOND_SAMPLER, SECOND_DECODE),
        (graphs.VIDEO, "images", SECOND_DECODE, SECOND_VIDEO),
        (graphs.SAVE, "video", SECOND_VIDEO, SECOND_SAVE),
    ):
        graph[own] = {**graph[node], "inputs": {**graph[node]["inputs"], name: [source, 0]}}
    return graph


def renumbered(graph: dict) -> dict:
    """The graph with a 9 before the ids of its nodes."""
    return {
        f"9{node}": {**content, "inputs": {
            name: [f"9{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in content["inputs"].items()
        }}
        for node, content in graph.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(comfyui) -> Path:
    return made(comfyui, graphs.video(seed=7, steps=3, cfg=4.0))


def test_the_file_says_what_ran(plain, checkpoint):
    jobs = jobs_in(plain)
    assert set(jobs) == {ENCODE, DENOISE, DECODE}
    job = jobs[DENOISE]
    expected = {"seed": 7, "steps": 3, "guidance": 4.0, "solver": "unipc", "quantization": "none", "batch": 1}
    assert expected.items() <= job.settings.items()
    assert job.plan["cfg_degree"] * job.plan["ulysses_degree"] == 2 == job.host.ranks and job.host.device == "cpu"
    assert job.size == jobs[DECODE].size == [9, 64, 64] and job.dtype == "float32" and job.accelerators == {}
    assert job.predicted and "denoise" in job.seconds and job.operators["operators"] == "torch"
    assert file_digest(checkpoint / "transformer" / WEIGHTS) in files_in(job)
    assert file_digest(checkpoint / "vae" / WEIGHTS) in files_in(jobs[DECODE])


def test_this_host_would_make_the_same_bits(plain, explain):
    status, text = explain(plain)
    assert status == 0 and "this host would make the same video, bit for bit" in text and "predicted    " in text
    assert "seed 7, 3 steps" in text and "a red circle" in text and "cfg x ring x ulysses x tp = 2 x 1 x 1 x 1" in text


def test_the_file_names_no_path_and_no_host(plain, comfyui, checkpoint):
    record = metadata.read(plain).record
    texts = [str(record), plain.read_bytes().decode(errors="replace")]
    for secret in (str(comfyui.base), str(checkpoint), str(Path.home()), socket.gethostname(), str(comfyui.port)):
        assert not any(secret in text for text in texts[: 1 if len(secret) < 8 else 2]), secret


def test_models_elsewhere_are_the_same_and_a_changed_byte_is_another_video(plain, explain, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "renamed")
    assert explain(plain, tmp_path)[0] == 0
    weights = tmp_path / "elsewhere" / "renamed" / "transformer" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    status, text = explain(plain, tmp_path)
    assert status == 1 and "this host would make another video, or none, because of:" in text
    assert f"the file of {len(content):,} bytes has other content" in text
    weights.unlink()
    status, text = explain(plain, tmp_path)
    assert status == 1 and "there is no such file" in text


def test_each_file_of_a_graph_has_its_own_record_also_when_nothing_runs_again(comfyui):
    """The last two graphs save again, and run no sampler, or no job of the ranks at all."""
    graph = two_videos(seed=12)
    prompt = comfyui.queue(graph)
    seeds = [jobs_in(graphs.saved(comfyui, prompt, node))[DENOISE].settings["seed"] for node in
             (graphs.SAVE, SECOND_SAVE)]  # fmt: skip
    assert seeds == [11, 12]
    for node, changed in ((graphs.VIDEO, {"fps": 8}), (SECOND_SAVE, {"filename_prefix": "video/again"})):
        graph[node]["inputs"].update(changed)
        before = comfyui.log.count("denoise 0.")
        prompt = comfyui.queue(graph)
        comfyui.wait(prompt)
        assert comfyui.log.count("denoise 0.") == before
        save, seed = (graphs.SAVE, 11) if node == graphs.VIDEO else (SECOND_SAVE, 12)
        assert jobs_in(graphs.saved(comfyui, prompt, save))[DENOISE].settings["seed"] == seed


def test_a_kept_latent_has_its_record_when_it_is_decoded_by_another_vae(comfyui):
    """The graph's nodes have other ids too, as a page gives them."""
    graph = graphs.video(seed=13)
    before = jobs_in(made(comfyui, graph))
    graph = renumbered(graph)
    graph[f"9{graphs.VAE}"]["inputs"]["model_name"] = "wan_vae.pth"
    after = jobs_in(made(comfyui, graph, f"9{graphs.SAVE}"))
    assert after[DENOISE] == before[DENOISE]
    assert files_in(after[DECODE]) == {file_digest(comfyui.base / "models" / "vae" / "wan_vae.pth")}


def test_accelerators_and_loras_are_in_the_record(comfyui, explain, checkpoint):
    lora = comfyui.base / "models" / "loras" / "explained.safetensors"
    lora.parent.mkdir(exist_ok=True)
    random_lora.save(lora, "kohya", load_file(checkpoint / "transformer" / WEIGHTS), seed=3)
    graph = graphs.video(seed=8, steps=4)
    window = {"preset": "custom", "start": 0, "end": 3, "interval": 4}
    graph["30"] = {"class_type": "AscendBlockCache", "inputs": window}
    graph["31"] = {"class_type": "AscendLoadLora", "inputs": {
        "model": [graphs.MODEL, 0], "lora_name": lora.name, "strength": 0.5}}  # fmt: skip
    graph[graphs.SAMPLER]["inputs"] |= {"acceleration": ["30", 0], "model": ["31", 0]}
    file = made(comfyui, graph)
    job = jobs_in(file)[DENOISE]
    (used,) = job.loras
    assert (used.file, used.strength, used.expert) == (file_digest(lora), 0.5, "both")
    assert used.form == "low-rank pairs"
    assert job.accelerators["block_cache"]["interval"] == 4 and job.saved["steps_reusing"] == 3
    assert 0 < job.saved["flops_saved"] < 1
    status, text = explain(file)
    assert status == 0 and "accelerator  block cache: " in text and "strength 0.5" in text
    lora.write_bytes(lora.read_bytes()[:-1] + b"\x07")
    status, text = explain(file)
    assert status == 1 and "LoRA" in text and "has other content" in text


def test_a_stock_graph_has_a_record_of_its_model_calls(comfyui, explain):
    graph = Graph()
    latent = sampled(graph, loaded(graph, ours=True))
    vae = graph.add("AscendVAELoader", vae_name="random_wan", parallel=parallel(graph, 2))
    images = graph.add("VAEDecode", samples=latent, vae=vae)
    graph["save"] = {"class_type": "SaveAnimatedWEBP", "inputs": {
        "images": images, "filename_prefix": "stock", "fps": 8, "lossless": False, "quality": 80,
        "method": "default"}}  # fmt: skip
    file = made(comfyui, graph, "save")
    jobs = jobs_in(file)
    assert set(jobs) == {DENOISE, DECODE}
    job = jobs[DENOISE]
    assert job.calls == 2 and job.settings["steps"] == 2 and job.plan["cfg_degree"] == 2
    assert job.settings["sigmas"][-1] == 0 and len(job.settings["sigmas"]) == 3 and job.seconds["denoise"] > 0
    status, text = explain(file)
    assert status == 1 and "cannot be known" in text and "graph's seed 3" in text


def test_pictures_have_it_too_and_disabled_metadata_are_left_out(comfyui):
    graph = graphs.video(seed=7, steps=3, cfg=4.0)
    graph["40"] = {"class_type": "SaveImage", "inputs": {"images": [graphs.DECODE, 0], "filename_prefix": "frame"}}
    first = comfyui.wait(comfyui.queue(graph))["outputs"]["40"]["images"][0]
    assert jobs_in(comfyui.output / first["filename"])[DENOISE].settings["seed"] == 7
    comfyui.post("/tests/metadata", {"disabled": True})
    try:
        graph[graphs.SAVE]["inputs"]["filename_prefix"] = "video/without"
        file = made(comfyui, graph)
    finally:
        comfyui.post("/tests/metadata", {"disabled": False})
    assert KEY.encode() not in file.read_bytes()
    assert command.run(Namespace(file=str(file), models=[], json=False)) == 2


def test_another_number_of_ranks_is_the_same_within_rounding(comfyui, plain, explain):
    """One rank made it, and the graph leaves the number of ranks open; last, as it starts other ranks."""
    file = made(comfyui, graphs.video(ranks=1, seed=7, steps=3, cfg=4.0))
    job = jobs_in(file)[DENOISE]
    assert job.host.ranks == 1 and job.plan["cfg_degree"] == 1 and files_in(job) == files_in(jobs_in(plain)[DENOISE])
    assert explain(file)[0] == 0
    read = metadata.read(plain)
    read.graph[graphs.PARALLEL]["inputs"]["ranks"] = 0
    found = command.host.reasons(read, command.host.Host.looked_at([comfyui.base / "models"], read))
    assert [reason.text for reason in found] == ["ranks: 2 made it, here are 1"]
    assert command.host.verdict_of(found) is command.host.Verdict.ROUNDING
