"""Linear layers in 8 bits: their arithmetic, where their weights come from, on how many ranks; what is refused."""

import json
import statistics
from types import SimpleNamespace

import comfy_formats
import described_folders
import gloo_ranks
import original_formats as formats
import pytest
import quantized_rank
import random_lora
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.models.wan.files.names import to_diffusers_name
from ascend_runtime.components import Components
from ascend_runtime.components.networks import empty_network
from ascend_runtime.models.shared.quantized.static import use_step
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import cut_dim, kept_in_8_bits
from ascend_runtime.ops import PlainOperators, quantization
from ascend_runtime.parallel import fsdp
from ascend_runtime.recognition.layout import find_transformer
from benchmarks import quantization as benchmark
from benchmarks.quantization import linears, nbytes
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

SHAPE = (1, 16, 2, 4, 6)
FLY = {"quantization": "w8a8_dynamic"}


def load(path, **spec):
    spec = DiffusionModelSpec(path=str(path), **{"dtype": "float32", **spec})
    return Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise


def velocity(network, text_dim=tiny_models.TEXT_DIM):
    generator = torch.Generator().manual_seed(3)
    latent, text = (torch.randn(*shape, generator=generator) for shape in (SHAPE, (1, 12, text_dim)))
    with torch.no_grad():
        return tiny_models.velocity(network, latent, torch.tensor([600.0]), text)


def relative(made, exact):
    return float((made - exact).norm() / exact.norm())


# The arithmetic


@pytest.mark.parametrize("rows, width, outputs", [(60, 96, 160), (1, 33, 17), (1000, 64, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_whole_numbers(monkeypatch, dtype, rows, width, outputs):
    """Also where they are made a few rows at a time, and of a token and a row of zeros. Half a step is lost of each."""
    print("seed 7")
    monkeypatch.setattr(quantization, "MAX_PRODUCTS", 300 * outputs)
    generator = torch.Generator().manual_seed(7)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((1, rows, width), (outputs, width),
                                                                             (outputs,)))  # fmt: skip
    x[0, 0], weight[0] = 0, 0
    x, bias = x.to(dtype), bias.to(dtype)
    (tokens, token_scale), (integers, scale) = map(quantization.quantized_rows, (x[0], weight))
    for given, kept, its_scale in ((x[0], tokens, token_scale), (weight, integers, scale)):
        largest = given.double().abs().amax(-1, keepdim=True)
        assert kept.dtype == torch.int8 and not kept[0].any()
        assert_close(its_scale[1:].double(), largest[1:] / 127, atol=0, rtol=1e-6)
        assert ((kept * its_scale.double() - given.double()).abs() <= 0.5001 * largest / 127).all()
    made = PlainOperators().quantized_linear(x, integers, scale.flatten(), bias)
    expected = tokens.double() @ integers.double().t() * token_scale * scale.t() + bias.double()
    assert made.dtype == dtype and made.shape == (1, rows, outputs)
    assert_close(made[0].double(), expected, atol=1e-5, rtol=1e-5 if dtype == torch.float32 else 2**-8)


def test_a_block_is_off_by_less_than_a_percent_and_weighs_half():
    """As the benchmark measures it, whose quick figures these are."""
    rows = {row.name.rpartition(".")[2]: row for row in benchmark.rows(quick=True)}
    error, weight = rows["relative_error"], rows["linear_bytes"]
    print(f"\na block of Wan 1.3B: {error.value:.2%} off ({error.context['of_what_it_adds']:.1%} of what it adds); its "
          f"layers weigh {weight.value:.3f} of bfloat16's, and take {rows['linear_time'].value:.2f} of fp32's time")
    assert 0.001 < error.value <= 0.01 and 0.5 < weight.value <= 0.51


# Folders that say how they are quantized


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Tensors by the original's names."""
    return load_file(random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=11))


FORMS = {
    "dynamic": {},
    "smoothed": {"smoothed": True},
    "static": {"algorithm": "W8A8"},
    "static, smoothed, scales as whole numbers": {"algorithm": "W8A8", "smoothed": True, "bits": True},
    "by timestep": {"algorithm": "W8A8_TIMESTEP"},
    "MXFP8": {"algorithm": "W8A8_MXFP8"},
    "MXFP8, smoothed": {"algorithm": "W8A8_MXFP8", "smoothed": True},
    "4 bits": {"algorithm": "W4A4_DYNAMIC"},
    "4 bits, smoothed": {"algorithm": "W4A4_DYNAMIC", "smoothed": True},
}
LOST = {"MXFP8": 0.1, "4 bits": 0.5}  # of the float network's output at most, by format; else 0.1


def watched(network, twins, original, step=None):
    """What each quantized layer is off its float twin, relative to its largest output, as the network computes."""
    off = []
    for layer, how in twins.items():
        module = network.get_submodule(to_diffusers_name(f"{layer}.weight").removesuffix(".weight"))

        def note(_, inputs, out, how=how, bias=original[f"{layer}.bias"]):
            twin = described_folders.twin_layer(how, inputs[0], bias, step)
            off.append(float((twin - out).abs().max() / twin.abs().max()))

        module.register_forward_hook(note)
    return off


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_equals_its_dequantized_twin(tmp_path, original, form):
    """Layer by layer, of what goes in; the whole is off the float network by what its few bits lose."""
    twins = described_folders.write(tmp_path / "quantized", original, **FORMS[form])
    save_file(original, tmp_path / "float.safetensors")
    network = load(tmp_path / "quantized")
    worst = watched(network, twins, original)
    made = velocity(network, random_wan.TEXT_DIM)
    off = relative(made, velocity(load(tmp_path / "float.safetensors"), random_wan.TEXT_DIM))
    print(f"\n{form}: {off:.2%} off the float network; {max(worst):.1e} a layer off its twin")
    # Of a static layer the bias is rounded to whole products of scales.
    assert len(worst) == len(twins) == 18 and max(worst) <= (1e-3 if "static" in form else 1e-5)
    assert 1e-3 < off < LOST.get(form.partition(",")[0], 0.1)


def test_each_step_has_static_scales_of_its_own(tmp_path, original):
    """In the steps that the model's own file names, as MindIE SD's TimestepPolicyConfig does; dynamic in all others."""
    folder, made = tmp_path / "quantized", {}
    twins = described_folders.write(folder, original, "W8A8_TIMESTEP")
    for step in (None, 1, 3):
        network = load(folder)
        use_step(network, step)
        worst = watched(network, twins, original, step)
        made[step] = velocity(network, random_wan.TEXT_DIM)
        print(f"\nstatic scales of step {step}: {max(worst):.1e} a layer off its twin")
        assert max(worst) <= 1e-3
    assert not any(torch.equal(made[one], made[other]) for one, other in ((None, 1), (None, 3), (1, 3)))


def test_it_lies_where_models_lie(tmp_path, original, capsys):
    """As diffusers' transformer/ with its own names; in the original's folder; as the file in it; in several shards."""
    network = tiny_models.wan_transformer(3)
    own = {name: x for name, x in network.state_dict().items()}
    config = {"_class_name": "WanTransformer3DModel", **{k: v for k, v in network.config.items() if k[0] != "_"}}
    described_folders.write(tmp_path / "pipeline" / "transformer", own, config=config)
    made = load(tmp_path / "pipeline")
    assert made.config.num_attention_heads == 4 and relative(velocity(made), velocity(as_ours(network))) < 0.05
    described_folders.write(tmp_path / "original", original, config={"_class_name": "WanModel", "num_heads": 4})
    expected = velocity(load(tmp_path / "original"), random_wan.TEXT_DIM)
    assert load(tmp_path / "original").config.num_attention_heads == 4
    described_folders.write(tmp_path / "bare", original)
    file = next((tmp_path / "bare").glob("*.safetensors"))
    for path in (tmp_path / "bare", file):
        assert load(path).config.num_attention_heads == 2
    tensors = load_file(file)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"quant_model_weights-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / "original" / shard)
    index = {name: f"quant_model_weights-{1 + names.index(name) % 2:05}-of-00002.safetensors" for name in names}
    (tmp_path / "original" / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(velocity(load(tmp_path / "original"), random_wan.TEXT_DIM), expected)
    assert inspection.run(SimpleNamespace(path=str(tmp_path / "pipeline"))) == 0
    assert "msModelSlim W8A8_DYNAMIC" in capsys.readouterr().out


def as_ours(network):
    ours = WanTransformer(network.config).eval()
    ours.load_state_dict(network.state_dict(), assign=True)
    return ours


# Files that are quantized as they are read


@pytest.mark.parametrize("form", ["bf16", "fp16", "fp8"])
def test_any_file_is_quantized_as_it_is_read(tmp_path, original, form):
    """Row by row, of the numbers that it stands for: the integers are those of quantizing it whole."""
    twin = {name: x if form == "fp8" else x.to(getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[form]))
            for name, x in original.items()}  # fmt: skip
    if form == "fp8":
        kept, scales = formats.in_8_bits(original)
        formats.save_old_mark(tmp_path / "wan", kept, scales)
        twin = formats.dequantized(kept, scales)
    else:
        save_file(twin, tmp_path / "wan")
    network, whole = load(tmp_path / "wan", dtype="bfloat16", **FLY), 0
    for name, x in twin.items():
        layer = to_diffusers_name(name).removesuffix(".weight")
        parameter = network.get_parameter(to_diffusers_name(name))
        assert (parameter.dtype == torch.int8) == (kept_in_8_bits(layer) and name.endswith(".weight")), name
        if parameter.dtype == torch.int8:
            integers, scale = quantization.quantized_rows(x.float())
            assert torch.equal(parameter, integers)
            assert torch.equal(network.get_parameter(f"{layer}.weight_scale"), scale)
            whole += 1
    assert whole == 2 * 9


def test_what_is_quantized_weighs_half(checkpoint):
    network, in_bf16 = load(checkpoint, dtype="bfloat16", **FLY), load(checkpoint, dtype="bfloat16")
    layers = linears(in_bf16, kept_in_8_bits)
    ours, theirs = (nbytes([net.get_submodule(name) for name in layers]) for net in (network, in_bf16))
    print(f"\n{len(layers)} layers: {ours} bytes instead of {theirs}, {ours / theirs:.3f}")
    matrices = sum(network.get_parameter(f"{name}.weight").nbytes for name in layers)
    assert 2 * matrices == sum(in_bf16.get_parameter(f"{name}.weight").nbytes for name in layers)
    assert len(layers) == 18 and ours - matrices < 0.1 * matrices


# Ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """(cases, one rank's network and velocity by case, what each of 4 ranks made, told and kept)"""
    folder = tmp_path_factory.mktemp("quantized")
    network = tiny_models.wan_transformer(5)
    network.save_pretrained(folder / "float")
    config = json.loads((folder / "float" / "config.json").read_text())
    paths = {"on the fly": folder / "float"}
    loras = {}
    wide = tiny_models.wan_transformer(5, attention_head_dim=32)  # four slices of which are whole groups of MXFP8
    for form in ("static, smoothed, scales as whole numbers", "smoothed", "by timestep", "MXFP8, smoothed", "4 bits"):
        own = wide if "MXFP8" in form else network
        paths[form] = folder / form
        config |= {"attention_head_dim": own.config.attention_head_dim}
        described_folders.write(folder / form, dict(own.state_dict()), config=config, **FORMS[form])
        if form != "smoothed":  # which is without a LoRA
            loras[form] = str(folder / f"{form}.safetensors")
            random_lora.save(loras[form], "lightx2v", own.state_dict(), seed=4)
    for form in ("int8, rotated", "4-bit levels"):
        own = tiny_models.wan_transformer(5, attention_head_dim=32, ffn_dim=256)  # in slices of whole rotated groups
        config |= {"attention_head_dim": 32, "ffn_dim": 256}
        paths[form] = comfy_formats.folder(folder / form, own.state_dict(), config, form)
        loras[form] = str(folder / f"{form}.safetensors")
        random_lora.save(loras[form], "lightx2v", own.state_dict(), seed=4)
    plans = {"slices": (4, False), "shares": (1, True), "shares of slices": (2, True)}
    cases = {
        f"{form}, {plan}": {"path": str(path), "tp": tp, "fsdp": fsdp,
                            "quantization": "w8a8_dynamic" if form == "on the fly" else "none",
                            "step": 2 if form == "by timestep" else None, "lora": loras.get(form)}
        for form, path in paths.items() for plan, (tp, fsdp) in plans.items()
        if "shares of" not in plan or form in ("on the fly", "smoothed")
    }  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    inputs = {"latent": torch.randn(SHAPE, generator=generator), "timestep": torch.tensor([600.0]),
              "text": torch.randn(1, 12, tiny_models.TEXT_DIM, generator=generator)}  # fmt: skip
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "cases.json").write_text(json.dumps(cases))
    gloo_ranks.run("quantized_rank.py", folder, 4)
    on_one_rank = {name: load(case["path"], quantization=case["quantization"], loras=quantized_rank.loras(case))
                   for name, case in cases.items()}  # fmt: skip
    for name, network in on_one_rank.items():
        use_step(network, cases[name]["step"])
    expected = {name: (network, velocity(network)) for name, network in on_one_rank.items()}
    ranks = [(load_file(folder / f"out-{rank}.safetensors"), json.loads((folder / f"told-{rank}.json").read_text()),
              load_file(folder / f"kept-{rank}.safetensors")) for rank in range(4)]  # fmt: skip
    return cases, expected, ranks


def test_ranks_with_parts_of_the_weights_equal_one(sharded):
    """FSDP to the last digit. Slices to that of a sum, as long as none of these digits rounds an integer another way,
    from where on all later ones differ: by what 8 bits lose anyway."""
    cases, expected, ranks = sharded
    worst = {name: max(float((outs[name] - whole).abs().max()) for outs, *_ in ranks)
             for name, (_, whole) in expected.items()}  # fmt: skip
    print("", *(f"{name}: {error:.1e} off one rank" for name, error in worst.items()), sep="\n")
    assert not any(error for name, error in worst.items() if name.endswith(", shares"))
    of_slices = [error for name, error in worst.items() if not name.endswith(", shares")]
    assert statistics.median(of_slices) <= 1e-4 and max(of_slices) < 0.05


def test_each_rank_keeps_a_part_of_the_integers_and_gathers_no_more(sharded):
    """Shares travel as the bytes that they are: of a float model's, by FSDP, about as many go as its weights weigh."""
    cases, expected, ranks = sharded
    for name, (network, _) in expected.items():
        integers = sum(p.nbytes for p in network.parameters() if p.dtype in quantized_rank.BYTES)
        assert all(told[name]["kept"] == integers // 4 for _, told, _ in ranks), name
        if name.endswith(", shares"):
            gathered = sum(p.nbytes for p in network.parameters())
            sent = sum(count for _, count in ranks[0][1][name]["sent"])
            assert sent <= gathered * 3 / 4 * 1.02, (sent, gathered)


def test_parts_of_a_row_have_the_scale_of_all_of_it(sharded):
    """Each rank keeps what it would cut out of one rank's integers."""
    cases, expected, ranks = sharded
    for name, (network, _) in expected.items():
        tp, shares = cases[name]["tp"], 4 // cases[name]["tp"] if cases[name]["fsdp"] else 1
        for rank, (*_, kept) in enumerate(ranks):
            for leaf in ("weight", "weight_scale", "deq_scale"):
                if (whole := network.get_submodule(quantized_rank.LAYER)._parameters.get(leaf)) is not None:
                    cut = leaf == "weight" or leaf == "weight_scale" and whole.shape[1] > 1
                    own = whole.chunk(tp, 1)[rank % tp] if cut else whole
                    assert torch.equal(kept[f"{name}, {leaf}"], own.chunk(shares)[rank // tp % shares]), (name, leaf)


def test_a_layer_in_slices_makes_what_it_makes_whole(sharded):
    """Of each format, of the same input: 4 ranks sum what they compute of parts of the rows."""
    cases, expected, ranks = sharded
    for name, (network, _) in expected.items():
        if name.endswith(", slices"):
            layer = network.get_submodule(quantized_rank.LAYER)
            with torch.no_grad():
                whole = layer(quantized_rank.rows(layer.in_features))
            worst = max(float((kept[f"{name}, rows"] - whole).abs().max() / whole.abs().max()) for *_, kept in ranks)
            print(f"\n{name}: {worst:.1e} off the whole layer")
            assert worst <= 1e-5


@pytest.mark.parametrize("plan", [{"tp_degree": 2}, {"fsdp": True}, {"ulysses_degree": 2, "cfg_degree": 1},
                                  {"ring_degree": 2, "cfg_degree": 1}], ids=str)  # fmt: skip
def test_two_ranks_make_the_video_of_one(two_ranks, one_rank, specs, plan):
    """As in the test above: to the digits of a sum, of one seed of four at least; else by less than 8 bits lose."""
    model, text, plan = DiffusionModelSpec(path=str(specs.folder), **FLY), specs.text(1), {"ranks": 2, **plan}

    def sample(runtime, spec, seed, **options):
        how = SampleSpec(steps=1, seed=seed, guidance_scale=1.0)
        return runtime.sample(spec, how, torch.zeros(SHAPE), text, -text, **options).tensor

    worst = []
    for seed in (2, 3, 5, 7):
        expected, made = sample(one_rank, model, seed), sample(two_ranks, model, seed, parallel=ParallelSpec(**plan))
        worst.append(float((made - expected).abs().max()))
        own = relative(expected, sample(one_rank, specs.model, seed))
        print(f"\n{plan}: {worst[-1]:.1e} off one rank, which is {own:.1%} off the float model; seed {seed}")
        assert 1e-3 < own < 0.02 and relative(made, expected) < own
    assert min(worst) <= 1e-4


def test_experts_take_turns(one_rank, specs_of, checkpoints):
    specs = specs_of(checkpoints(experts=2))
    text = specs.text(1)
    latents = [
        one_rank.sample(DiffusionModelSpec(path=str(specs.folder), experts=experts, **FLY),
                        SampleSpec(seed=5, steps=3, shift=5.0), torch.zeros(SHAPE), text, -text).tensor
        for experts in ("resident", "swap", "swap")
    ]  # fmt: skip
    assert torch.equal(latents[0], latents[1]) and torch.equal(latents[0], latents[2])


def test_experts_of_which_one_is_quantized_do_not_take_turns(tmp_path, original):
    described_folders.write(tmp_path / "high", original)
    save_file(original, tmp_path / "low.safetensors")
    spec = {"low_noise_path": str(tmp_path / "low.safetensors"), "experts": "swap"}
    with pytest.raises(ValueError, match="experts is 'swap', but their weights have different shapes"):
        load(tmp_path / "high", **spec)


# What is refused


def test_a_torch_that_shares_no_integers(monkeypatch):
    """It says that only floating point can require gradients, which an older torch asks for without need."""
    network = WanTransformer(tiny_models.wan_transformer().config)

    def too_old(*_, **__):
        raise RuntimeError("only Tensors of floating point dtype can require gradients")

    monkeypatch.setattr(fsdp, "fully_shard", too_old)
    with pytest.raises(ValueError, match="cannot shard 8-bit weights. Use torch 2.13, or turn fsdp off"):
        fsdp.ShardedWeights(fsdp.Sharding(mesh=object()), cut_dim, lambda name: False, network.units).prepare(network)


def edited(folder, tensors=None, said=None):
    """Changes a folder's tensors and what is said of them; None takes one away."""
    file, description = next(folder.glob("*.safetensors")), next(folder.glob("*.json"))
    for path, changes, read, write in (
        (file, tensors, load_file, save_file),
        (description, said, lambda path: json.loads(path.read_text()), lambda x, path: path.write_text(json.dumps(x))),
    ):
        content = {**read(path), **(changes or {})}
        write({name: x for name, x in content.items() if x is not None}, path)


Q = "blocks.1.self_attn.q"
BAD = {
    "no scales": ({"tensors": {f"{Q}.weight_scale": None}}, "1 missing: blocks.1.attn1.to_q.weight_scale"),
    "a scale of zero": ({"tensors": {f"{Q}.weight_scale": torch.zeros(256, 1)}}, f"must be above 0: {Q}.weight_sc"),
    "a scale that is no number": (
        {"tensors": {f"{Q}.weight_scale": torch.full((256, 1), torch.nan)}}, f"must be above 0: {Q}.weight_scale"
    ),
    "one scale": ({"tensors": {f"{Q}.weight_scale": torch.ones(1, 1)}}, r"to_q.weight_scale is \[1, 1\], not \[256, 1"),
    "an offset": ({"tensors": {f"{Q}.weight_offset": torch.ones(256, 1)}}, f"symmetric: {Q}.weight_offset"),
    "a weight of another shape": (
        {"tensors": {f"{Q}.weight": torch.ones(256, 128, dtype=torch.int8)}}, r"to_q.weight is \[256, 128\], not"
    ),
    "a weight that is no integer": ({"tensors": {f"{Q}.weight": torch.ones(256, 256)}}, f"{Q}.weight as torch.float32"),
    "an integer that nothing is said of": ({"said": {f"{Q}.weight": None}}, f"not floating-point.*: {Q}.weight as"),
    "a layer that there is not": (
        {"said": {"blocks.9.ffn.0.weight": "W8A8_DYNAMIC"}}, "Only linear layers.*1 are not: blocks.9.ffn"
    ),
    "an embedder": (
        {"said": {"text_embedding.0.weight": "W8A8_DYNAMIC"}}, "can be quantized; 1 are not: condition_embedder.text"
    ),
    "8 bits that are said to be MXFP8": (
        {"said": {f"{Q}.weight": "W8A8_MXFP8"}}, f"2 with an unexpected dtype: {Q}.*{Q}.* Use the model's W8A8_DYN"
    ),
    "MXFP4": (
        {"said": {f"{Q}.weight": "W4A4_MXFP4_DUALSCALE"}},
        f"1 as W4A4_MXFP4_DUALSCALE: {Q}. MXFP4 is 4-bit .* 950 series. Use the model's W8A8_MXFP8, W8A8_DYNAMIC, bf16",
    ),
    "MXFP4 that is corrected by a product of small matrices": ({"said": {f"{Q}.weight": "W4A4_MXFP4_SVD"}}, "MXFP4 is"),
    "weights of fewer bits": ({"said": {f"{Q}.weight": "W4A16"}}, "as W4A16: .*activations on cards of the A2 and A3"),
    "an attention": (
        {"said": {"blocks.0.self_attn.quant_type": "FP8_DYNAMIC"}},
        "1 as FP8_DYNAMIC: blocks.0.self_attn. These attentions .* without msModelSlim's processors fa3_quant",
    ),
    "an older attention": (
        {"said": {"blocks.0.self_attn.fa_q.scale": "FAQuant"}}, "1 as FAQUANT: blocks.0.self_attn. .*of the A2 and A3"
    ),
    "an attention's keys": (
        {"said": {"blocks.0.self_attn.fa_k.scale": "FAKQuant", f"{Q}.weight": "W4A4_MXFP4"}},
        "1 as FAKQUANT: blocks.0.self_attn; 1 as W4A4_MXFP4: .*These attentions.*MXFP4 is",
    ),
    "all attentions": ({"said": {"fa_quant_type": "FAKQuant"}}, "FAKQUANT: fa_quant_type. These"),
    "what nobody knows": ({"said": {f"{Q}.weight": "W3A5"}}, f"1 as W3A5: {Q}. Use the model's W8A8_DYNAMIC"),
    "all left alone": ({"said": {}}, "names no quantized weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, original, what):
    changes, says = BAD[what]
    described_folders.write(tmp_path / "wan", original)
    if what == "all left alone":
        next((tmp_path / "wan").glob("*.json")).write_text(json.dumps(dict.fromkeys(original, "FLOAT")))
    else:
        edited(tmp_path / "wan", **changes)
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "wan")
    assert inspection.run(SimpleNamespace(path=str(tmp_path / "wan"))) == 1


@pytest.mark.parametrize("text, says", [("{", "is not JSON"), ("[]", "JSON object"), ('{"a.weight": 3}', "no qu")])
def test_a_broken_description(tmp_path, original, text, says):
    described_folders.write(tmp_path / "wan", original)
    next((tmp_path / "wan").glob("*.json")).write_text(text)
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "wan")


def test_two_descriptions(tmp_path, original):
    for algorithm in ("W8A8", "W8A8_DYNAMIC"):
        described_folders.write(tmp_path / "wan", original, algorithm)
    with pytest.raises(ValueError, match="several descriptions.*_w8a8.json, .*_w8a8_dynamic.json"):
        load(tmp_path / "wan")


def test_a_description_for_each_rank(tmp_path, original):
    """That of one rank, of a model that was quantized on one, is the whole model's."""
    described_folders.write(tmp_path / "wan", original)
    described = next((tmp_path / "wan").glob("*.json"))
    described.rename(tmp_path / "wan" / "quant_model_description_w8a8_dynamic_0.json")
    assert load(tmp_path / "wan").config.num_layers == 2
    (tmp_path / "wan" / "quant_model_description_w8a8_dynamic_1.json").write_text("{}")
    with pytest.raises(ValueError, match="one description per rank: .*_0.json, .*_1.json.*Quantize the model on one"):
        load(tmp_path / "wan")


BITS = {
    "W8A8_MXFP8": {
        "a value that is no number": ("weight", 0x7F, "values that are not finite in blocks.1.attn1.to_q.weight"),
        "an exponent that is no number": ("weight_scale", 255, "not exponents from 0 to 254 in blocks.1.attn1.to_q"),
    },
    "W4A4_DYNAMIC": {"a value of 5 bits": ("weight", 8, "not integers of 4 bits, -8 to 7 in blocks.1.attn1.to_q")},
}  # fmt: skip


@pytest.mark.parametrize("algorithm, what", [(one, what) for one, cases in BITS.items() for what in cases])
def test_bits_that_stand_for_nothing(tmp_path, original, algorithm, what):
    leaf, bits, says = BITS[algorithm][what]
    described_folders.write(tmp_path / "wan", original, algorithm)
    file = next((tmp_path / "wan").glob("*.safetensors"))
    wrong = load_file(file)[f"{Q}.{leaf}"]
    wrong.view(torch.uint8)[3, 2] = bits
    edited(tmp_path / "wan", tensors={f"{Q}.{leaf}": wrong})
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "wan")


@pytest.mark.parametrize("algorithm, heads, says", [
    ("W8A8_MXFP8", 24, "gives each rank 48 of the 96 inputs of blocks.0.attn1.to_out.0, but its W8A8_MXFP8.*of 32"),
    ("W4A4_DYNAMIC", 6, "gives each rank 12 of the 24 inputs of .*to_out.0, but its W4A4_DYNAMIC.*of 8"),
    ("W8A8_DYNAMIC", 6, None),
])  # fmt: skip
def test_groups_of_inputs_are_not_cut_apart(tmp_path, algorithm, heads, says):
    network = tiny_models.wan_transformer(1, attention_head_dim=heads)
    config = {"_class_name": "WanTransformer3DModel", **{k: v for k, v in network.config.items() if k[0] != "_"}}
    described_folders.write(tmp_path / "wan", dict(network.state_dict()), algorithm, config=config)
    component = find_transformer(str(tmp_path / "wan"))
    two = SimpleNamespace(degree=2)
    if says is None:
        assert empty_network(component, two).config.num_attention_heads == 4
    else:
        with pytest.raises(ValueError, match=f"tp_degree is 2, which {says}.*Set tp_degree to a smaller number"):
            empty_network(component, two)


def test_inputs_that_fill_no_int32(tmp_path):
    network = tiny_models.wan_transformer(1, attention_head_dim=6, num_attention_heads=2)
    described_folders.write(tmp_path / "wan", dict(network.state_dict()), "W4A4_DYNAMIC", config=dict(network.config))
    with pytest.raises(ValueError, match="to_q has 12 inputs; W4A4_DYNAMIC needs a multiple of 8"):
        load(tmp_path / "wan")


@pytest.mark.parametrize("algorithm, steps, says", [
    ("W8A8_TIMESTEP", [1, 4], None),
    ("W8A8_TIMESTEP", [1, 5], r"defaults.json sets static_steps to \[1, 5\], but the model has scales for 4 steps"),
    ("W8A8_DYNAMIC", [1, 4], "but no layer of the model is in W8A8_TIMESTEP. Correct it, or leave static_steps out"),
    ("W8A8_TIMESTEP", [3, 3], r"static_steps is \[3, 3\]; it must be \[first, end\]"),
])  # fmt: skip
def test_steps_that_have_static_scales(tmp_path, original, capsys, algorithm, steps, says):
    described_folders.write(tmp_path / "wan", original, algorithm)
    (tmp_path / "wan" / "ascend_defaults.json").write_text(json.dumps({"static_steps": steps}))
    if says is None:
        assert load(tmp_path / "wan").config.num_layers == 2
        assert inspection.run(SimpleNamespace(path=str(tmp_path / "wan"))) == 0
        assert "static scales in steps 1 to 3" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match=says):
            load(tmp_path / "wan")
        assert inspection.run(SimpleNamespace(path=str(tmp_path / "wan"))) == 1


def test_what_does_not_go_with_it(tmp_path, original, checkpoint):
    with pytest.raises(ValueError, match="it can be one of none, w8a8_dynamic"):
        DiffusionModelSpec(path=str(checkpoint), quantization="w4a4")
    described_folders.write(tmp_path / "wan", original)
    with pytest.raises(ValueError, match="is quantized already. Set quantization to 'none'"):
        load(tmp_path / "wan", **FLY)
    with pytest.raises(ValueError, match="says that the transformer is quantized.*bf16 or fp16 version"):
        conversion.planned(tmp_path / "wan", "diffusers", None, "5GB")
