"""LoRAs in every layout, on every plan, make what a checkpoint merged by hand makes; and leave nothing when they go."""

import os
import shutil

import pytest
import random_lora
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, SampleSpec
from ascend_runtime.models.wan.files.lora_names import LORA_NAMES
from ascend_runtime.recognition.lora.files import read_lora
from ascend_runtime.recognition.lora.changes import LowRank
from ascend_runtime.components import Components
from ascend_runtime.components.loras.adapter import Adapter
from benchmarks.opens import Opened
from diffusers.loaders import lora_conversion_utils
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

SHAPE = (1, 16, 2, 4, 6)
WEIGHTS = "diffusion_pytorch_model.safetensors"
STRENGTH = 0.7
PLANS = {
    "one rank": (1, {}),
    "Ulysses 2": (2, {"ulysses_degree": 2}),
    "FSDP 2": (2, {"fsdp": True}),
    "slices 2": (2, {"tp_degree": 2}),
}

WHOLE = ("one rank", "Ulysses 2")  # plans in which each rank holds all weights


def sample(runtime, model, text, parallel=None, **hooks):
    spec = SampleSpec(steps=2, seed=1, guidance_scale=4.0, shift=5.0)
    return runtime.sample(model, spec, torch.zeros(SHAPE), text, -text, parallel=parallel, **hooks).tensor


def parameters(folder, name="transformer"):
    return load_file(folder / name / WEIGHTS)


def with_loras(folder, *loras, **changes):
    return DiffusionModelSpec(path=str(folder), loras=loras, **changes)


def merged(folder, to, *added, name="transformer", dtype=torch.float32):
    """A copy of the checkpoint with `added` merged into one expert."""
    if not to.exists():
        shutil.copytree(folder, to)
    random_lora.merge(folder / name / WEIGHTS, to / name / WEIGHTS, *added, dtype=dtype)
    return to


@pytest.fixture(scope="module")
def loras(checkpoint, tmp_path_factory):
    """For each layout its file and what it adds."""
    folder, made = tmp_path_factory.mktemp("loras"), {}
    for seed, layout in enumerate(random_lora.LAYOUTS):
        file = folder / f"{layout}.safetensors"
        made[layout] = str(file), random_lora.save(file, layout, parameters(checkpoint), seed=seed)
    return made


@pytest.fixture(scope="module")
def expected(one_rank, specs, loras, checkpoint, tmp_path_factory):
    """For each layout what the merged checkpoint makes, with the base's None."""
    made = {None: sample(one_rank, specs.model, specs.text(1))}
    for layout, (_, added) in loras.items():
        folder = merged(checkpoint, tmp_path_factory.mktemp("merged") / "m", (STRENGTH, added))
        made[layout] = sample(one_rank, with_loras(folder), specs.text(1))
        assert (made[layout] - made[None]).abs().max() > 0.1, "the LoRA changes nothing"
    return made


@pytest.mark.parametrize("plan", PLANS)
def test_every_layout_on_every_plan(runtimes, specs, loras, expected, checkpoint, plan):
    """One after the other on a loaded model: each replaces the one before; at last the base is back, bit by bit."""
    ranks, degrees = PLANS[plan]
    parallel = ParallelSpec(ranks=ranks, **degrees)
    base = sample(runtimes(ranks), specs.model, specs.text(1), parallel)
    with Opened(sorted(checkpoint.glob("transformer*/*.safetensors"))) as opened:
        for layout, (path, _) in loras.items():
            model = with_loras(specs.folder, LoraSpec(path=path, strength=STRENGTH))
            latent = sample(runtimes(ranks), model, specs.text(1), parallel)
            assert_close(latent, expected[layout], atol=1e-4, rtol=0.0, msg=layout)
            if layout != "dora" or plan in WHOLE:
                assert opened.files() == [], layout
        assert torch.equal(sample(runtimes(ranks), specs.model, specs.text(1), parallel), base)


def test_a_new_strength_of_dora_reads_no_weights_again(runtimes, specs, loras, checkpoint):
    """Also where a rank holds a part of each weight, and has read the rest for the norms."""
    path, parallel = loras["dora"][0], ParallelSpec(ranks=2, fsdp=True)
    latents = []
    for strength in (0.2, STRENGTH):
        with Opened(sorted(checkpoint.glob("transformer*/*.safetensors"))) as opened:
            model = with_loras(specs.folder, LoraSpec(path=path, strength=strength))
            latents.append(sample(runtimes(2), model, specs.text(1), parallel))
        assert bool(opened.files()) == (strength == 0.2)
    assert (latents[0] - latents[1]).abs().max() > 1e-2


@pytest.mark.parametrize("plan", ["one rank", "FSDP 2", "slices 2"])
def test_several_and_other_strengths(runtimes, one_rank, specs, loras, checkpoint, tmp_path, plan):
    """A changed strength is as if it had been asked for at once; the same ones are not merged again."""
    ranks, degrees = PLANS[plan]
    parallel = ParallelSpec(ranks=ranks, **degrees)
    (first, adds_first), (second, adds_second) = loras["kohya"], loras["lightx2v"]
    for number, (a, b) in enumerate([(0.5, 1.0), (-0.3, 0.0), (0.5, 1.0)]):
        model = with_loras(specs.folder, LoraSpec(path=first, strength=a), LoraSpec(path=second, strength=b))
        latent = sample(runtimes(ranks), model, specs.text(1), parallel)
        by_hand = merged(checkpoint, tmp_path / str(number), (a, adds_first), (b, adds_second))
        told = []
        again = sample(runtimes(ranks), model, specs.text(1), parallel, on_progress=lambda *news: told.append(news[0]))
        assert torch.equal(again, latent) and "load" not in told
        if ranks > 1:
            runtimes(ranks).free()
        assert_close(latent, sample(one_rank, with_loras(by_hand), specs.text(1)), atol=1e-4, rtol=0.0)


def test_in_bfloat16_bit_by_bit(one_rank, specs, loras, checkpoint, tmp_path):
    """The sum is made in fp32 and rounded once, for bfloat16 LoRAs too; what stays in fp32 is not rounded at all."""
    file = tmp_path / "lora.safetensors"
    added = random_lora.save(file, "original", parameters(checkpoint), seed=9, dtype=torch.bfloat16)
    added = {name: change for name, change in added.items() if "time_embedder" not in name}
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if "time_embedding" not in key}, file)
    by_hand = merged(checkpoint, tmp_path / "merged", (STRENGTH, added), dtype=torch.bfloat16)
    model = with_loras(specs.folder, LoraSpec(path=str(file), strength=STRENGTH), dtype="bfloat16")
    latent = sample(one_rank, model, specs.text(1))
    assert torch.equal(latent, sample(one_rank, with_loras(by_hand, dtype="bfloat16"), specs.text(1)))


@pytest.mark.parametrize("ranks, degrees, experts", [
    (1, {}, "resident"), (1, {}, "swap"), (2, {"fsdp": True}, "auto"), (2, {"tp_degree": 2}, "swap")
])  # fmt: skip
def test_each_expert_has_its_own(runtimes, one_rank, checkpoints, specs_of, tmp_path, ranks, degrees, experts):
    folder = checkpoints(experts=2)
    text, parallel = specs_of(folder).text(1), ParallelSpec(ranks=ranks, **degrees)
    runtime, base = runtimes(ranks), with_loras(folder, experts=experts)
    before = sample(runtime, base, text, parallel)
    files, by_hand = [], tmp_path / "merged"
    for seed, (expert, name) in enumerate([("high_noise", "transformer"), ("low_noise", "transformer_2")]):
        file = tmp_path / f"{expert}.safetensors"
        added = random_lora.save(file, "lightx2v", parameters(folder), seed=20 + seed)
        files.append(LoraSpec(path=str(file), strength=1.0 + seed, expert=expert))
        merged(folder, by_hand, (1.0 + seed, added), name=name)
    latent, again = (sample(runtime, with_loras(folder, *files, experts=experts), text, parallel) for _ in range(2))
    assert torch.equal(latent, again)
    for lora in files:  # one of them alone is something else
        alone = sample(runtime, with_loras(folder, lora, experts=experts), text, parallel)
        assert (alone - latent).abs().max() > 1e-2
    assert torch.equal(sample(runtime, base, text, parallel), before)
    assert_close(latent, sample(one_rank, with_loras(by_hand), text), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("in_place", [False, True], ids=["moves", "in place"])
def test_originals_come_back_to_where_they_were(specs, loras, checkpoint, tmp_path, monkeypatch, in_place):
    """Also when a merge is broken off. On a CPU they are the mapped file, of which nothing is copied; on a device the
    weights are written over."""
    if in_place:
        monkeypatch.setattr(Adapter, "_may_move", lambda adapter, parameter: False)
    file = (checkpoint / "transformer" / WEIGHTS).read_bytes()
    components = Components(torch.device("cpu"))

    def get(*chosen, on_bytes=lambda done, total: None):
        return dict(components.get(with_loras(specs.folder, *chosen), on_bytes).high_noise.named_parameters())

    def broken_off(done, total):
        if done > total / 3:
            raise InterruptedError

    path, added = loras["lightx2v"]
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in get().items()}
    random_lora.merge(checkpoint / "transformer" / WEIGHTS, tmp_path / "merged", (STRENGTH, added))
    chosen = LoraSpec(path=path, strength=STRENGTH)
    for attempt in (chosen, LoraSpec(path=path, strength=-1.0), LoraSpec(path=loras["kohya"][0])):
        with pytest.raises(InterruptedError):
            get(attempt, on_bytes=broken_off)
        merged_weights = get(chosen)
        for name, weight in load_file(tmp_path / "merged").items():
            assert_close(merged_weights[name].data, weight, atol=1e-6, rtol=0.0)
            moved = merged_weights[name].data_ptr() != before[name][0]
            assert moved == (name in added and not in_place), name
        with pytest.raises(InterruptedError):
            get(on_bytes=broken_off)
        for name, weight in get().items():
            assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1]), name
    assert (checkpoint / "transformer" / WEIGHTS).read_bytes() == file


def test_a_warm_model_stays_warm(one_rank, specs, loras):
    spec, text = SampleSpec(steps=2, seed=1, guidance_scale=1.0, shift=5.0), specs.text(1)
    one_rank.free()
    warmed = []
    for strength in (0.5, 0.6):
        model = with_loras(specs.folder, LoraSpec(path=loras["kohya"][0], strength=strength))
        warmed.append("warm up" in one_rank.sample(model, spec, torch.zeros(SHAPE), text, warm_up=True).seconds)
    assert warmed == [True, False]


def test_a_file_that_changes_is_merged_anew(one_rank, specs, loras, expected, tmp_path):
    file = tmp_path / "lora.safetensors"
    for layout in ("kohya", "original"):
        shutil.copy(loras[layout][0], tmp_path / "next")
        os.replace(tmp_path / "next", file)
        model = with_loras(specs.folder, LoraSpec(path=str(file), strength=STRENGTH))
        assert_close(sample(one_rank, model, specs.text(1)), expected[layout], atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("layout, convert", [
    ("kohya", lora_conversion_utils._convert_musubi_wan_lora_to_diffusers),
    ("lightx2v", lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers),
    ("original", lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers),
])  # fmt: skip
def test_layers_and_scales_are_those_that_diffusers_finds(layout, convert, checkpoint, tmp_path):
    """Where diffusers knows the layer: it leaves out differences of norms, and converts none outside the blocks."""
    base = parameters(checkpoint)
    random_lora.save(tmp_path / "lora.safetensors", layout, base, seed=3)
    inside = {key: x for key, x in load_file(tmp_path / "lora.safetensors").items()
              if "blocks" in key and not key.endswith((".diff_m", "modulation.diff"))}  # fmt: skip
    save_file(inside, tmp_path / "inside.safetensors")
    theirs = convert({key: tensor.clone() for key, tensor in inside.items()})  # it scales some in place
    theirs = {key.removeprefix("transformer."): tensor for key, tensor in theirs.items()}
    shapes = {name: tuple(x.shape) for name, x in base.items()}
    ours = read_lora(tmp_path / "inside.safetensors", shapes, LORA_NAMES).changes
    layers = {key.removesuffix(".lora_A.weight") for key in theirs if key.endswith(".lora_A.weight")}
    assert len(layers) == 20 and {f"{layer}.weight" for layer in layers} == {
        name for name, change in ours.items() if isinstance(change, LowRank)
    }  # fmt: skip
    for layer in layers:
        change = ours[f"{layer}.weight"]
        product = change.scale * (inside[change.up] @ inside[change.down])
        assert_close(product, theirs[f"{layer}.lora_B.weight"] @ theirs[f"{layer}.lora_A.weight"])
    biases = {key.replace(".lora_B.bias", ".bias") for key in theirs if key.endswith(".lora_B.bias")}
    assert biases == {name for name in ours if name.endswith(".bias") and "norm" not in name}


def another_kind(tensors):
    return {"diffusion_model.blocks.0.self_attn.q.stranger": torch.ones(96, 1)}


def another_rank(tensors):
    return {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(3, 96)}


def one_half(tensors):
    return {"diffusion_model.head.head.lora_B.weight": None}


def twice(tensors):
    return {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 96)}


def not_a_number(tensors):
    return {"diffusion_model.blocks.0.ffn.2.lora_B.weight": torch.full((96, 4), torch.nan)}


def of_whole_numbers(tensors):
    return {"diffusion_model.blocks.0.ffn.2.lora_B.weight": torch.ones(96, 4, dtype=torch.int8)}


REFUSED = {
    another_kind: ["1 of an unknown kind: diffusion_model.blocks.0.self_attn.q.stranger"],
    another_rank: ["1 that make no complete change", "lora_B.weight [96, 4] and", "q.lora_A.weight [3, 96]"],
    one_half: ["that make no complete change", "head.head.lora_A.weight (of proj_out.weight)"],
    twice: ["given twice", "transformer.blocks.0.attn1.to_q.lora_A.weight"],
    not_a_number: ["1 with NaN or infinite values: diffusion_model.blocks.0.ffn.2.lora_B.weight"],
    of_whole_numbers: ["1 that are not floating-point: diffusion_model.blocks.0.ffn.2.lora_B.weight as torch"],
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_lora_that_does_not_fit_is_refused_by_name(one_rank, specs, loras, expected, tmp_path, spoil):
    """Whole, before anything is changed; also where a good one stands before it."""
    tensors = load_file(loras["original"][0])
    tensors |= spoil(tensors)
    path = str(tmp_path / "lora.safetensors")
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path)
    good = LoraSpec(path=loras["kohya"][0], strength=STRENGTH)
    with pytest.raises(ValueError) as caught:
        sample(one_rank, with_loras(specs.folder, good, LoraSpec(path=path)), specs.text(1))
    error = str(caught.value)
    assert path in error and all(part in error for part in REFUSED[spoil]), error
    assert_close(sample(one_rank, specs.model, specs.text(1)), expected[None], atol=0.0, rtol=0.0)


MISFITS = {
    "diffusion_model.blocks.7.self_attn.q.lora_A.weight": torch.ones(4, 96),
    "diffusion_model.blocks.7.self_attn.q.lora_B.weight": torch.ones(96, 4),
    "lora_te_q.alpha": torch.ones(()),
    "diffusion_model.patch_embedding.diff": torch.ones(96, 36, 1, 2, 2),
    "diffusion_model.blocks.0.norm3.diff": torch.ones(97),
}


@pytest.mark.parametrize("plan", ["FSDP 2", "slices 2"])
def test_what_does_not_fit_is_left_out_with_one_warning(runtimes, specs, loras, expected, tmp_path, caplog, plan):
    """By all ranks alike; the warning is in every job's result, and once in the log."""
    ranks, degrees = PLANS[plan]
    tensors = {key: x for key, x in load_file(loras["original"][0]).items() if "patch_embedding" not in key}
    save_file(tensors, tmp_path / "fits.safetensors")
    save_file(tensors | MISFITS, tmp_path / "misfits.safetensors")
    spec, made = SampleSpec(steps=2, seed=1, guidance_scale=4.0, shift=5.0), {}
    caplog.set_level("WARNING", logger="ascend_runtime")
    for name in ("fits", "misfits", "misfits"):
        model = with_loras(specs.folder, LoraSpec(path=str(tmp_path / f"{name}.safetensors"), strength=STRENGTH))
        text, parallel = specs.text(1), ParallelSpec(ranks=ranks, **degrees)
        made[name] = runtimes(ranks).sample(model, spec, torch.zeros(SHAPE), text, -text, parallel=parallel)
        said = made[name].info.get("warnings", [])
        assert len(said) == (name == "misfits")
    assert torch.equal(made["fits"].tensor, made["misfits"].tensor)
    assert "2 of no layer of this model: diffusion_model.blocks.7.self_attn.q.lora_A.weight, " in said[0]
    assert "1 of text encoders, which LoRAs do not change here: lora_te_q.alpha" in said[0]
    assert "2 of the wrong shape: diffusion_model.blocks.0.norm3.diff [97] for blocks.0.norm2.weight [96], " in said[0]
    assert "made for an image-to-video model (36 channels); this is a text-to-video model (16 channels)" in said[0]
    assert caplog.messages.count(said[0]) == 1


def test_other_refusals(two_ranks, specs, loras, expected, tmp_path):
    """By all ranks alike, which live on."""
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    pids = two_ranks.pids
    for lora, says in [
        (LoraSpec(path=str(tmp_path / "none.safetensors")), "There is no LoRA .*none.safetensors.*models/loras"),
        (LoraSpec(path=str(tmp_path / "empty.safetensors")), "It holds no tensors"),
        (LoraSpec(path=str(tmp_path / "cut.safetensors")), "is not a complete .safetensors file"),
        (LoraSpec(path=loras["kohya"][0], expert="low_noise"), "expert low_noise, but this model has only one expert"),
    ]:
        with pytest.raises(ValueError, match=says):
            sample(two_ranks, with_loras(specs.folder, lora), specs.text(1), ParallelSpec(ranks=2, fsdp=True))
    for wrong in ({"strength": 101.0}, {"strength": float("nan")}, {"expert": "both_of_them"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoraSpec(path="x", **wrong)
    latent = sample(two_ranks, specs.model, specs.text(1), ParallelSpec(ranks=2, fsdp=True))
    assert_close(latent, expected[None], atol=1e-4, rtol=0.0)
    assert two_ranks.pids == pids


def test_an_image_to_video_networks_own_layers(tmp_path):
    """A network that sees no image through CLIP goes without them, and takes the others, whatever they are called."""
    network = tiny_models.wan_transformer(image_dim=40, added_kv_proj_dim=96)
    shapes = {name: tuple(x.shape) for name, x in network.named_parameters()}
    plain = {name: tuple(x.shape) for name, x in tiny_models.wan_transformer().named_parameters()}
    layers = {"blocks.0.cross_attn.k_img": 96, "blocks.1.cross_attn.v_img": 96, "img_emb.proj.3": 40}
    image = {
        "blocks.0.attn2.add_k_proj.weight", "blocks.1.attn2.add_v_proj.weight", "blocks.0.attn2.norm_added_k.weight",
        "condition_embedder.image_embedder.ff.net.2.weight", "condition_embedder.image_embedder.norm1.bias",
    }  # fmt: skip

    def saved(name, prefix, spelled=str):
        tensors = {}
        for layer, into in (layers | ({} if name == "image" else {"blocks.0.cross_attn.q": 96})).items():
            tensors[f"{prefix}{spelled(layer)}.lora_down.weight"] = torch.ones(2, into)
            tensors[f"{prefix}{spelled(layer)}.lora_up.weight"] = torch.ones(96, 2)
        tensors[f"{prefix}{spelled('blocks.0.cross_attn.norm_k_img')}.diff"] = torch.ones(96)
        tensors[f"{prefix}{spelled('img_emb.proj.0')}.diff_b"] = torch.ones(40)
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    for file in (saved("original", "diffusion_model."), saved("kohya", "lora_unet_", lambda x: x.replace(".", "_"))):
        whole, fitting = read_lora(file, shapes, LORA_NAMES), read_lora(file, plain, LORA_NAMES)
        assert set(whole.changes) == {*image, "blocks.0.attn2.to_q.weight"} and whole.warning == ""
        assert set(fitting.changes) == {"blocks.0.attn2.to_q.weight"}
        assert f"{file} is used without some of its tensors: 8 of layers for CLIP's image, which" in fitting.warning
        assert "cross_attn" in fitting.warning
    with pytest.raises(ValueError, match="none of its 8 tensors fits. It was made for an image-to-video model"):
        read_lora(saved("image", "diffusion_model."), plain, LORA_NAMES)
