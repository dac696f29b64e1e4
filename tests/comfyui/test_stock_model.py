"""Core's MODEL whose network runs on the ranks, in core's samplers: as with core's UNETLoader on the same weights."""

import os
import random
import re
import signal
from functools import partial

import comfy_graphs as graphs
import pytest
import torch
from comfy_listener import Listener
from core_twin import both
from rank_processes import ranks_of, seconds_until
from safetensors.torch import save_file
from stock_graphs import Graph, apart, loaded, sampled, twins

from scripts.lib.comfy_server import PromptFailed

TOLERANCE = 1e-5
ACCELERATED_TOLERANCE = 1e-4
FAIR_SAMPLE = 3  # samplers


def ours(comfyui, seed: int) -> torch.Tensor:
    """A latent by our loader."""
    graph = Graph()
    graph.save("ours", sampled(graph, loaded(graph, ours=True), seed=seed))
    return graphs.saved_latent(comfyui, comfyui.queue(graph), "ours")


def model_by(class_type, **inputs):
    """A graph that samples with a MODEL that this node has changed."""
    return lambda graph, model: sampled(graph, graph.add(class_type, model=model, **inputs), cfg=3.0)


def prompts(graph: Graph, model, **changes):
    return sampled(graph, model, **{name: make(graph) for name, make in changes.items()})


def on_area(graph: Graph) -> list:
    area = {"width": 0.5, "height": 1.0, "temporal": 0.7, "x": 0.5, "y": 0.0, "z": 0.3, "strength": 0.7}
    part = graph.add("ConditioningSetAreaPercentageVideo", conditioning=graph.text(3, tokens=33), **area)
    return graph.add("ConditioningCombine", conditioning_1=graph.text(1), conditioning_2=part)


def on_mask(graph: Graph) -> list:
    mask = graph.add("SolidMask", value=1.0, width=64, height=32)
    mask = graph.add("MaskComposite", destination=graph.add("SolidMask", value=0.0, width=64, height=64), source=mask,
                     x=0, y=16, operation="add")  # fmt: skip
    part = {"conditioning": graph.text(3), "mask": mask, "strength": 0.8, "set_cond_area": "default"}
    part = graph.add("ConditioningSetMask", **part)
    return graph.add("ConditioningCombine", conditioning_1=graph.text(1), conditioning_2=part)


def by_time(graph: Graph) -> list:
    parts = [
        graph.add("ConditioningSetTimestepRange", conditioning=graph.text(seed, tokens), start=start, end=end)
        for seed, tokens, start, end in ((1, 20, 0.0, 0.5), (3, 33, 0.5, 1.0))
    ]
    return graph.add("ConditioningCombine", conditioning_1=parts[0], conditioning_2=parts[1])


def with_further_frames(graph: Graph, seed: int) -> list:
    return graph.add("TestAttachToConditioning", conditioning=graph.text(seed), what="further frames")


def noise_mask(graph: Graph, model) -> list:
    latent = graph.add("SetLatentNoiseMask", samples=sampled(graph, model, steps=1), mask=half_mask(graph))
    return sampled(graph, model, latent_image=latent, denoise=0.6, seed=7)


def half_mask(graph: Graph) -> list:
    sizes = ((0.0, 64), (0.6, 32))
    whole, half = (graph.add("SolidMask", value=value, width=64, height=height) for value, height in sizes)
    return graph.add("MaskComposite", destination=whole, source=half, x=0, y=0, operation="add")


def differential(graph: Graph, model) -> list:
    return noise_mask(graph, graph.add("DifferentialDiffusion", model=model, strength=1.0))


def leftover(graph: Graph, model) -> list:
    """Two samplers share the steps, and the noise that is left goes from one to the other."""
    common = {"model": model, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "noise_seed": 3,
              "positive": graph.text(1), "negative": graph.text(2)}  # fmt: skip
    first = graph.add("KSamplerAdvanced", **common, latent_image=graph.empty(), add_noise="enable", start_at_step=0,
                      end_at_step=2, return_with_leftover_noise="enable")  # fmt: skip
    return graph.add("KSamplerAdvanced", **common, latent_image=first, add_noise="disable", start_at_step=2,
                     end_at_step=10000, return_with_leftover_noise="disable")  # fmt: skip


def guided(class_type: str, **inputs):
    """A graph with core's advanced sampler and one of its guiders; inputs that are numbers are seeds of texts."""

    def made(graph: Graph, model) -> list:
        own = {name: graph.text(value) if isinstance(value, int) else value for name, value in inputs.items()}
        return graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("RandomNoise", noise_seed=3),
            guider=graph.add(class_type, model=model, **own),
            sampler=graph.add("KSamplerSelect", sampler_name="res_multistep"),
            sigmas=graph.add("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0),
            latent_image=graph.empty(),
        )

    return made


CACHED = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 0.95, "verbose": False}
WINDOWS = {"context_length": 9, "context_overlap": 5, "context_schedule": "standard_static", "context_stride": 1,
           "closed_loop": False, "fuse_method": "pyramid", "split_conds_to_windows": False, "freenoise": False,
           "retain_first_frame": False}  # fmt: skip (the last three: of newer cores)
SKIPPED = {"start_percent": 0.0, "end_percent": 1.0, "double_layers": "1, 7", "single_layers": "0"}
FEATURES = {
    "one pass a step": lambda graph, model: sampled(graph, model, cfg=1.0),
    "a batch of an odd size": lambda graph, model: sampled(graph, model, latent_image=graph.empty(5, 56, 2, 72)),
    "texts of unequal length": lambda graph, model: prompts(graph, model, positive=lambda graph: graph.text(1, 33)),
    "an area": lambda graph, model: prompts(graph, model, positive=on_area),
    "a mask of the conditioning": lambda graph, model: prompts(graph, model, positive=on_mask),
    "time ranges": lambda graph, model: prompts(graph, model, positive=by_time),
    "further frames": lambda graph, model: prompts(
        graph, model, positive=partial(with_further_frames, seed=1), negative=partial(with_further_frames, seed=2)),
    "a noise mask": noise_mask,
    "DifferentialDiffusion": differential,
    "leftover noise": leftover,
    "BasicGuider": guided("BasicGuider", conditioning=1),
    "CFGGuider": guided("CFGGuider", positive=1, negative=2, cfg=3.0),
    "DualCFGGuider": guided(
        "DualCFGGuider", cond1=1, cond2=3, negative=2, cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular"),
    "PerpNegGuider": guided("PerpNegGuider", positive=1, negative=2, empty_conditioning=3, cfg=3.0, neg_scale=0.7),
    "ModelSamplingSD3": model_by("ModelSamplingSD3", shift=8.0),
    "CFGZeroStar": model_by("CFGZeroStar"),
    "CFGNorm": model_by("CFGNorm", strength=0.9),
    "RescaleCFG": model_by("RescaleCFG", multiplier=0.7),
    "EasyCache": lambda graph, model: sampled(graph, graph.add("EasyCache", model=model, **CACHED), steps=6),
    "LazyCache": lambda graph, model: sampled(graph, graph.add("LazyCache", model=model, **CACHED), steps=6),
    "context windows": lambda graph, model: sampled(
        graph, graph.add("WanContextWindowsManual", model=model, **WINDOWS), latent_image=graph.empty(21), steps=2),
    "SkipLayerGuidanceDiT": model_by("SkipLayerGuidanceDiT", **SKIPPED, scale=3.0, rescaling_scale=0.1),
    "SkipLayerGuidanceDiTSimple": model_by("SkipLayerGuidanceDiTSimple", **SKIPPED),
    "a function wrapper": model_by("TestAttachToModel", what="a function wrapper"),
    "fp32 by ModelComputeDtype": model_by("ModelComputeDtype", dtype="fp32"),
}  # fmt: skip


def test_a_stock_graph_gives_the_same_latent_with_our_loader(comfyui, request):
    for ranks in (1, 2) if request.config.getoption("--all-stock") else (2,):  # another number has ranks started
        assert apart(comfyui, twins(partial(sampled, steps=3), ranks)) <= TOLERANCE


@pytest.mark.parametrize("feature", FEATURES)
def test_what_core_can_do_with_a_model(comfyui, feature):
    assert apart(comfyui, twins(FEATURES[feature])) <= TOLERANCE


def test_samplers(comfyui, request, rng):
    """All of core's, or a sample of those that other tests do not use."""
    names = comfyui.get("/object_info/KSampler")["KSampler"]["input"]["required"]["sampler_name"][0]
    assert len(names) >= 42
    chosen = names if request.config.getoption("--all-stock") else rng.sample(names, FAIR_SAMPLE)
    for name in chosen:
        error = apart(comfyui, twins(partial(sampled, sampler_name=name, steps=3)))
        print(f"{name}: {error:.1e}")
        assert error <= TOLERANCE, name


def attached(what):
    return model_by("TestAttachToModel", what=what)


def conditioned(what):
    return lambda graph, model: sampled(
        graph, model, positive=graph.add("TestAttachToConditioning", conditioning=graph.text(1), what=what)
    )


def saved(graph: Graph, model) -> None:
    graph.add("ModelSave", model=model, filename_prefix="saved")


def extracted(graph: Graph, model) -> None:
    graph.add("LoraSave", model_diff=model, filename_prefix="saved", rank=2, lora_type="standard", bias_diff=True)


def merged(graph: Graph, model) -> list:
    return sampled(graph, graph.add("ModelMergeSimple", model1=model, model2=model, ratio=0.5))


def hooked(graph: Graph, model) -> list:
    hooks = graph.add("CreateHookLoraModelOnly", lora_name=HOOK, strength_model=1.0)
    text = graph.add("ConditioningSetProperties", cond_NEW=graph.text(1), **HOOKED, hooks=hooks)
    return sampled(graph, model, positive=text)


HOOKED = {"strength": 1.0, "set_cond_area": "default"}
HOOK = "hook.safetensors"
ADVICE = ("core's Load Diffusion Model", "core's own loader", "Ascend Parallel Config")


def hook_lora(file) -> None:
    layer = "diffusion_model.blocks.0.ffn.0"
    file.parent.mkdir(exist_ok=True)
    save_file({f"{layer}.lora_up.weight": torch.ones(512, 2), f"{layer}.lora_down.weight": torch.ones(2, 256)}, file)


ROPE = {f"{kind}_{axis}": number for axis in "xyt" for kind, number in (("scale", 2.0), ("shift", 0.0))}
REFUSED = {  # -> words of the error
    "an injection": (attached("an injection"), ("injection 'other_pack'",)),
    "a layer": (attached("a layer"), ("attaching.attends", "diffusion_model.blocks.0.cross_attn.forward")),
    "a weight wrapper": (attached("a weight wrapper"), ("attaching.attends", "blocks.0.ffn.0.weight")),
    "an attention patch": (attached("an attention patch"), ("attaching.attends", "attn2_patch")),
    "an attention replacement": (attached("an attention replacement"), ("attaching.attends", "attn1")),
    "a block": (attached("a block"), ("attaching.replaces_a_block", "double_block 1")),
    "another attention": (attached("another attention"), ("attaching.attends", "attention")),
    "ScaleROPE": (model_by("ScaleROPE", **ROPE), ("ScaleROPE",)),
    "TomePatchModel": (model_by("TomePatchModel", ratio=0.3), ("nodes_tomesd", "attn1_patch")),
    "a ControlNet": (conditioned("a ControlNet"), ("positive", "ControlNet")),
    "gligen": (conditioned("gligen"), ("positive", "GLIGEN")),
    "vace_frames": (conditioned("vace_frames"), ("VACE", "vace_frames")),
    "camera_conditions": (conditioned("camera_conditions"), ("camera",)),
    "audio_embed": (conditioned("audio_embed"), ("audio_embed",)),
    "ModelMergeSimple": (merged, ("This MODEL", "merged", "in the ranks")),
    "ModelSave": (saved, ("This MODEL", "saved", "in the ranks")),
    "LoraSave": (extracted, ("This MODEL", "compared", "in the ranks")),
    "a hook LoRA": (hooked, ("hook", "LoRA loader")),
    "a save by newer cores": (attached("a save as newer cores do it"), ("This MODEL", "saved", "in the ranks")),
    "a copy on another device": (attached("a copy on another device"), ("MultiGPU CFG Split", "which cards")),
}  # fmt: skip


@pytest.mark.parametrize("refused", REFUSED)
def test_what_cannot_reach_the_ranks_is_refused_by_name_and_the_graph_runs_without_it(comfyui, refused):
    make, words = REFUSED[refused]
    hook_lora(comfyui.base / "models" / "loras" / HOOK)
    graph = Graph()
    model = loaded(graph, ours=True)
    latent = make(graph, model)
    if latent:
        graph.save("ours", latent)
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(graph))
    error = caught.value.details["exception_message"]
    print(error)
    assert caught.value.details["exception_type"] in ("ValueError", "RuntimeError")
    assert all(word in error for word in words)
    assert any(advice in error for advice in ADVICE)
    after = ours(comfyui, random.randrange(2**32))  # an equal one is not computed again
    assert after.isfinite().all() and after.std() > 0.1


HARMLESS = {what: ("TestAttachToModel", {"what": what}) for what in (
    "a compiled layer", "a block as it is", "a block that the model lacks", "an unknown option",
)} | {"TorchCompileModel": ("TorchCompileModel", {"backend": "inductor"})}  # fmt: skip


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_changes_nothing_is_not_refused(comfyui, harmless):
    class_type, inputs = HARMLESS[harmless]
    graph = Graph()
    model = loaded(graph, ours=True)
    changed = graph.add(class_type, model=model, **inputs)
    graph.save("core", sampled(graph, model, seed=5))
    graph.save("ours", sampled(graph, changed, seed=5))
    assert apart(comfyui, graph) == 0
    assert harmless != "an unknown option" or comfyui.log.count("set the option 'of_another_pack'") == 1


def accelerated(node: str, sampler_name: str = "euler", **widgets) -> dict:
    """A graph whose text goes through KSampler ("core") and Ascend Sampler ("ours"), with one accelerator for both."""
    graph = both(steps=8, cfg=3.0, shift=5.0, seed=7)
    loader = graph["20"]
    loader["class_type"], loader["inputs"]["parallel"] = "AscendUNETLoader", [graphs.PARALLEL, 0]
    graph["30"] = {"class_type": node, "inputs": widgets}
    graph["31"] = {"class_type": "AscendApplyAcceleration", "inputs": {"model": ["21", 0], "acceleration": ["30", 0]}}
    graph["22"]["inputs"].update(model=["31", 0], sampler_name=sampler_name)
    graph[graphs.SAMPLER]["inputs"]["acceleration"] = ["30", 0]
    return graph


REPORTS = re.compile(r"Ascend: (.+ steps reused|.+ % dense)")
CUSTOM = {"preset": "custom", "start": 1, "end": 6, "interval": 3}


@pytest.mark.parametrize("node, widgets", [
    ("AscendAttentionCache", CUSTOM),
    ("AscendBlockCache", CUSTOM),
    ("AscendStepCache", {"preset": "custom", "method": "fbcache", "threshold": 3.0}),
    ("AscendStepCache", {"preset": "custom", "method": "taylorseer"}),
    ("AscendRainFusion", {"preset": "custom", "start": 1, "sparsity": 0.4}),
])  # fmt: skip
def test_accelerators_skip_the_same_work_as_in_our_sampler(comfyui, node, widgets):
    log = len(comfyui.log)
    error = apart(comfyui, accelerated(node, **widgets))
    reports = REPORTS.findall(comfyui.log[log:])
    print(f"{error:.1e}", reports)
    assert error <= ACCELERATED_TOLERANCE
    assert len(reports) == 2 and reports[0] == reports[1] and " 0 of" not in reports[0]


def test_a_sampler_that_runs_the_model_twice_a_step_is_refused_with_a_cache(comfyui):
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(accelerated("AscendAttentionCache", "heun", **CUSTOM)))
    assert all(word in str(caught.value) for word in ("heun", "euler"))
    comfyui.wait(comfyui.queue(accelerated("AscendAttentionCache", **CUSTOM)))


def test_an_accelerator_on_a_model_of_core_is_refused(comfyui):
    graph = accelerated("AscendAttentionCache", **CUSTOM)
    graph["20"]["class_type"] = "UNETLoader"
    del graph["20"]["inputs"]["parallel"]
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(graph))
    assert "Ascend Load Diffusion Model (Core)" in str(caught.value)


def test_a_model_whose_heads_core_does_not_know_is_refused(comfyui):
    graph = Graph()
    graph.save("ours", sampled(graph, loaded(graph, ours=True, name=graphs.HEAVY)))
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(graph))
    assert all(word in str(caught.value) for word in ("no MODEL", graphs.HEAVY, "Ascend Sampler"))


def test_comfyui_counts_no_memory_of_its_own_for_the_model(comfyui):
    graph = Graph()
    [node, _] = graph.add("TestModelFacts", model=loaded(graph, ours=True))
    (facts,) = comfyui.wait(comfyui.queue(graph))["outputs"][node]["facts"]
    assert facts == {"size": 1, "needed": 0, "device": "cpu", "parameters": 0, "class": "WAN21", "layers": 2}


def test_the_loader_has_cores_widgets_and_all_that_core_lists(comfyui):
    core, ours = (comfyui.get(f"/object_info/{name}")[name]["input"] for name in ("UNETLoader", "AscendUNETLoader"))
    assert list(core["required"]) == list(ours["required"]) and list(ours["optional"]) == ["parallel"]
    for name, (options, *_) in core["required"].items():
        assert options and set(options) <= set(ours["required"][name][1]["options"])


def test_fp8_is_accepted_with_a_warning(comfyui):
    graph = Graph()
    model = loaded(graph, ours=True)
    graph[model[0]]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    graph.save("ours", sampled(graph, model, seed=13))
    assert torch.equal(graphs.saved_latent(comfyui, comfyui.queue(graph), "ours"), ours(comfyui, seed=13))
    assert "weight_dtype fp8_e4m3fn has no effect" in comfyui.log


def kill_a_rank(comfyui) -> None:
    os.kill(ranks_of(comfyui.process.pid)[1], signal.SIGKILL)
    seconds_until(lambda: not ranks_of(comfyui.process.pid), timeout=5)


LOSSES = [
    lambda comfyui: comfyui.post("/free", {"unload_models": True}),
    lambda comfyui: comfyui.post("/free", {"unload_models": True, "free_memory": True}),
    kill_a_rank,
]


def test_what_the_ranks_lost_comes_back(comfyui, request, rng):
    for loss in LOSSES if request.config.getoption("--all-stock") else [rng.choice(LOSSES)]:
        expected = ours(comfyui, seed=1)
        ours(comfyui, seed=2)
        loss(comfyui)
        assert torch.equal(ours(comfyui, seed=1), expected)
        ours(comfyui, seed=2)


def test_cancel_ends_a_run_between_two_model_calls_and_the_ranks_stay(comfyui):
    graph = Graph()
    latent = sampled(graph, loaded(graph, ours=True), steps=400)
    graph.save("ours", latent)
    with Listener(comfyui) as listener:
        run = listener.queue(graph)
        run.wait_for_step(latent[0], 2)
        before = ranks_of(comfyui.process.pid)
        comfyui.post("/interrupt")
        ending = run.end()
    assert ending.kind == "execution_interrupted" and ending.data["node_id"] == latent[0]
    assert ranks_of(comfyui.process.pid) == before
    assert ours(comfyui, seed=11).isfinite().all()


def test_reading_of_weights_shows_progress_within_the_first_step_and_can_be_cancelled(comfyui):
    comfyui.post("/free", {"unload_models": True})
    graph = Graph()
    latent = sampled(graph, loaded(graph, ours=True), seed=12)
    graph.save("ours", latent)
    comfyui.post("/tests/cancel", {"node": latent[0], "loading": True})
    with pytest.raises(PromptFailed) as caught:
        comfyui.wait(comfyui.queue(graph))
    assert caught.value.kind == "execution_interrupted" and caught.value.details["node_id"] == latent[0]
    assert ours(comfyui, seed=12).isfinite().all()
