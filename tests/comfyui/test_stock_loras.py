"""LoRAs on a core MODEL whose network runs on the ranks, by core's own loaders: what core makes with its own MODEL."""

import comfy_graphs as graphs
import hunyuan_formats
import pytest
import random_hunyuan
import random_lora
import random_lycoris
import torch
from ascend_runtime.models.wan.files.names import to_diffusers_name
from safetensors.torch import load_file, save_file
from scripts.lib.comfy_server import PromptFailed
from stock_graphs import MODEL, Graph, apart, difference, loaded, parallel, sampled, twins

TOLERANCE = 1e-4
HUNYUAN = "stock_hunyuan.safetensors"
LAYOUTS = ("original", "kohya", "wan fun", "lightx2v")
MODULATION = (".diff_m", "modulation.diff")  # core changes no modulation
IMAGE_LAYER = "diffusion_model.patch_embedding.diff"


@pytest.fixture(scope="module")
def loras(comfyui):
    """The `comfyui` with random LoRAs for its Wan model and a HunyuanVideo model in models/loras."""
    folder, models = comfyui.base / "models" / "loras", comfyui.base / "models" / "diffusion_models"
    folder.mkdir(exist_ok=True)
    tensors = load_file(models / MODEL)
    parameters = {to_diffusers_name(name): tensor for name, tensor in tensors.items()}
    for seed, layout in enumerate((*LAYOUTS, "diffusers")):
        file = folder / f"stock {layout}.safetensors"
        random_lora.save(file, layout, parameters, seed=seed)
        save_file({key: x for key, x in load_file(file).items() if not key.endswith(MODULATION)}, file)
    lycoris(folder / "stock lycoris.safetensors", tensors)
    lycoris(folder / "stock dora.safetensors", tensors, dora=True)
    state = random_hunyuan.transformer("t2v", **random_hunyuan.AS_CORE).state_dict()
    tensors = hunyuan_formats.comfyui_transformer(state)
    save_file(tensors, models / HUNYUAN)
    lycoris(folder / "stock hunyuan.safetensors", tensors, dora=True)
    return comfyui


def lycoris(file, tensors, dora=False):
    """A file with all of LyCORIS's formats, and pairs, for all matrices of a model. dora: with DoRA's magnitudes."""
    generator, made = torch.Generator().manual_seed(8), {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim == 2 and name.endswith(".weight"):
            form = random_lycoris.MATRICES[number % len(random_lycoris.MATRICES)]
            ends, added = random_lycoris.tensors(form, tuple(tensor.shape), generator, size=0.02)
            if dora and form != "diff":
                by = random_lora.MAGNITUDES[number % 2]
                end, ends["dora_scale"], _ = random_lora.decomposed(tensor.float(), added, by, generator)
                assert end == "dora_scale"
            made |= {f"diffusion_model.{name.removesuffix('.weight')}.{end}": each for end, each in ends.items()}
    save_file(made, file)


def with_loras(*chosen):
    """A graph that samples with these LoRAs, (name, strength), of core's loader."""

    def make(graph: Graph, model: list) -> list:
        for name, strength in chosen:
            model = graph.add("LoraLoaderModelOnly", model=model, lora_name=f"stock {name}.safetensors",
                              strength_model=strength)  # fmt: skip
        return few_steps(graph, model)

    return make


def few_steps(graph: Graph, model: list, **changes) -> list:
    return sampled(graph, model, **{"steps": 2, "cfg": 2.0} | changes)


def ours(comfyui, make, name=MODEL) -> torch.Tensor:
    graph = Graph()
    graph.save("ours", make(graph, loaded(graph, ours=True, name=name)))
    return graphs.saved_latent(comfyui, comfyui.queue(graph), "ours")


def written(comfyui) -> set:
    return {(path.name, path.stat().st_mtime_ns) for path in comfyui.base.rglob("ascend_loras/*")}


@pytest.mark.parametrize("name", [*LAYOUTS, "lycoris", "dora"])
def test_each_layout_changes_what_it_changes_in_core(loras, name):
    graph = twins(with_loras((name, 0.7)))
    graph.save("base", few_steps(graph, loaded(graph, ours=True)))
    prompt = loras.queue(graph)
    core, made, base = (graphs.saved_latent(loras, prompt, name) for name in ("core", "ours", "base"))
    assert difference(core, made) <= TOLERANCE and difference(base, made) > 100 * TOLERANCE


def test_a_stack_that_grows_changes_and_goes(loras):
    """Each as in core; a new strength writes no file, files that were deleted are written again, and without LoRAs the
    model is what it was, bit by bit."""
    base = ours(loras, few_steps)
    stack = [("kohya", 0.6)]
    assert apart(loras, twins(with_loras(*stack))) <= TOLERANCE
    stack += [("lightx2v", -0.8), ("original", 0.6)]
    assert apart(loras, twins(with_loras(*stack))) <= TOLERANCE
    before = written(loras)
    stack[1] = ("lightx2v", 0.3)
    assert apart(loras, twins(with_loras(*stack))) <= TOLERANCE
    assert written(loras) == before and before
    del stack[0]
    for file in loras.base.rglob("ascend_loras/*"):
        file.unlink()
    assert apart(loras, twins(with_loras(*stack))) <= TOLERANCE
    assert len(written(loras)) == 2
    assert torch.equal(ours(loras, few_steps), base)


def test_the_order_of_dora_and_other_loras_is_that_of_the_graph(loras):
    """Each of DoRA's norms is that of the weight with the LoRAs before; equal strengths are not enough to be one."""
    latents = []
    for stack in ([("kohya", 0.6), ("dora", 0.9), ("lycoris", 0.6)], [("lycoris", 0.6), ("dora", 0.9), ("kohya", 0.6)]):
        graph = twins(with_loras(*stack))
        prompt = loras.queue(graph)
        core, made = (graphs.saved_latent(loras, prompt, name) for name in ("core", "ours"))
        assert difference(core, made) <= TOLERANCE
        latents.append(made)
    assert difference(*latents) > 10 * TOLERANCE


def test_hunyuan_video_with_fused_layers(loras):
    def make(graph: Graph, model: list) -> list:
        model = graph.add("LoraLoaderModelOnly", model=model, lora_name="stock hunyuan.safetensors", strength_model=0.5)
        text = graph.add("TestRandomText", seed=1, tokens=7, width=random_hunyuan.TEXT_DIM, pooled=768)
        return few_steps(graph, model, cfg=1.0, positive=text, negative=text)

    assert apart(loras, twins(make, name=HUNYUAN)) <= TOLERANCE


def test_a_layer_of_another_shape_is_left_out_as_in_core_and_named_in_the_log(loras):
    file = loras.base / "models" / "loras" / "stock misfit.safetensors"
    kohya = load_file(loras.base / "models" / "loras" / "stock kohya.safetensors")
    save_file(kohya | {IMAGE_LAYER: torch.ones(256, 36, 1, 2, 2)}, file)
    assert apart(loras, twins(with_loras(("misfit", 0.7)))) <= TOLERANCE
    assert "is used without some of its tensors: 1 of the wrong shape: diffusion_model.patch_embedding" in loras.log


def test_a_lora_of_which_nothing_fits_changes_nothing_as_in_core(loras):
    save_file({IMAGE_LAYER: torch.ones(256, 36, 1, 2, 2)}, loras.base / "models" / "loras" / "stock other.safetensors")
    assert apart(loras, twins(with_loras(("other", 0.7)))) <= TOLERANCE
    assert "changes nothing, as none of its tensors fits: 1 of the wrong shape" in loras.log


def test_modulations_are_changed_where_core_changes_none(loras):
    """What core makes from a file into which the differences are merged."""
    name, models = "diffusion_model.blocks.1.modulation.diff", loras.base / "models" / "diffusion_models"
    tensors = load_file(models / MODEL)
    change = 0.3 * torch.randn(tensors["blocks.1.modulation"].shape, generator=torch.Generator().manual_seed(3))
    save_file({name: change}, loras.base / "models" / "loras" / "stock modulation.safetensors")
    merged = tensors | {"blocks.1.modulation": tensors["blocks.1.modulation"] + 0.8 * change}
    save_file(merged, models / "merged_modulation.safetensors")
    graph = Graph()
    graph.save("core", few_steps(graph, loaded(graph, ours=False, name="merged_modulation.safetensors")))
    graph.save("ours", with_loras(("modulation", 0.8))(graph, loaded(graph, ours=True)))
    graph.save("core without", with_loras(("modulation", 0.8))(graph, loaded(graph, ours=False)))
    prompt = loras.queue(graph)
    core, without, made = (graphs.saved_latent(loras, prompt, name) for name in ("core", "core without", "ours"))
    assert difference(core, made) <= TOLERANCE and difference(without, made) > 100 * TOLERANCE


def test_diffusers_names_are_left_out_as_in_core_and_named_in_the_log(loras):
    graph = twins(with_loras(("diffusers", 0.7)))
    graph.save("base", few_steps(graph, loaded(graph, ours=True)))
    prompt = loras.queue(graph)
    core, made, base = (graphs.saved_latent(loras, prompt, name) for name in ("core", "ours", "base"))
    assert difference(core, made) <= TOLERANCE and torch.equal(made, base)
    assert "lora key not loaded: transformer.blocks.0.attn1.to_q.lora_A.weight" in loras.log


def test_a_loader_for_model_and_clip_changes_the_model_only(loras):
    """The file has no layers of text encoders, so the strength for CLIP has no effect, as in core."""
    graph = Graph()
    clip = graph.add("AscendCLIPLoader", clip_name="umt5.safetensors", type="wan", device="default",
                     parallel=parallel(graph, 2))  # fmt: skip
    for save, by_us in (("core", False), ("ours", True)):
        both = graph.add("LoraLoader", model=loaded(graph, by_us), clip=clip, lora_name="stock kohya.safetensors",
                         strength_model=0.7, strength_clip=0.9)  # fmt: skip
        texts = {name: graph.add("CLIPTextEncode", clip=[both[0], 1], text=name) for name in ("positive", "negative")}
        graph.save(save, few_steps(graph, both, **texts))
    assert apart(loras, graph) <= TOLERANCE


def patched(what, strength=0.5):
    return lambda graph, model: few_steps(
        graph, graph.add("TestPatchWeights", model=model, what=what, strength=strength)
    )


@pytest.mark.parametrize("what", ["a difference", "a difference as core once kept it", "a pair", "DoRA",
                                  "the same pair for two weights", "a difference of another shape",
                                  "matrices of different ranks"])  # fmt: skip
def test_what_other_packs_attach(loras, what):
    assert apart(loras, twins(patched(what))) <= TOLERANCE


REFUSED = {
    "another shape": "that give weights another shape",
    "a padded difference": "that give weights another shape",
    "a whole weight": "of the kind set",
    "a scaled weight": "that scale weights",
    "rows of a weight": "of a part of a weight",
    "a function": "of a part of a weight, or through a function",
    "OFT": "of the kind oft",
    "another model": "of another model's weights",
    "schedule": "outside of the network: model_sampling.sigmas",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_ranks_cannot_add_is_refused_by_key_and_the_graph_runs_without_it(loras, what):
    graph = Graph()
    graph.save("ours", patched(what)(graph, loaded(graph, ours=True)))
    with pytest.raises(PromptFailed) as caught:
        loras.wait(loras.queue(graph))
    said = caught.value.details["exception_message"]
    key = "model_sampling.sigmas" if what == "schedule" else "diffusion_model.blocks.0.self_attn.q.weight"
    assert REFUSED[what] in said and key in said and "Take that node out of the graph" in said, said
    assert ours(loras, few_steps).isfinite().all()
