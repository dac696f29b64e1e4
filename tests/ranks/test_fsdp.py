"""Each rank reads and keeps its part of the weights alone, a share or a slice, and gathers what the formulas say."""

import json
import math

import gloo_ranks
import original_formats
import pytest
import tiny_models
import torch
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import keeps_fp32, replicated
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

RANKS = 3
LAYERS = 6
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Neither 104 nor 160 divides by 3, and 1 is less: the image's positions lie on rank 0 alone.
NETWORKS = {
    "t2v": {"attention_head_dim": 26, "num_layers": LAYERS},
    "i2v": {"attention_head_dim": 26, "num_layers": LAYERS, "in_channels": 36, "image_dim": 40,
            "added_kv_proj_dim": 104, "pos_embed_seq_len": 514},
    "six heads": {"num_attention_heads": 6, "attention_head_dim": 26, "ffn_dim": 162, "num_layers": LAYERS,
                  "in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 156},
    "8 bits": {"num_attention_heads": 6, "attention_head_dim": 26, "ffn_dim": 162, "num_layers": LAYERS},
}  # fmt: skip
CASES = {
    "t2v": {"network": "t2v", "tp": 1, "fsdp": True, "dtype": "float32"},
    "i2v": {"network": "i2v", "tp": 1, "fsdp": True, "dtype": "float32"},
    "i2v in bfloat16": {"network": "i2v", "tp": 1, "fsdp": True, "dtype": "bfloat16"},
    "i2v in slices": {"network": "six heads", "tp": 3, "fsdp": False, "dtype": "float32"},
    "i2v in slices, in bfloat16": {"network": "six heads", "tp": 3, "fsdp": False, "dtype": "bfloat16"},
    "8 bits shared": {"network": "8 bits", "tp": 1, "fsdp": True, "dtype": "float32"},
    "8 bits in slices": {"network": "8 bits", "tp": 3, "fsdp": False, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What three ranks made of the cases: weights_rank.py's files, beside each network and its inputs."""
    folder = tmp_path_factory.mktemp("weights")
    for name, changes in NETWORKS.items():
        network = tiny_models.wan_transformer(seed=5, **changes)
        network.save_pretrained(folder / name)
        if name == "8 bits":
            original_formats.save_old_mark(folder / name / WEIGHTS, *in_8_bits(folder / name))
        save_file(inputs(name), folder / f"{name}.safetensors")
    cases = {
        name: {"checkpoint": str(folder / case["network"]), "inputs": f"{case['network']}.safetensors",
               **{key: value for key, value in case.items() if key != "network"}}
        for name, case in CASES.items()
    }  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    gloo_ranks.run("weights_rank.py", folder, RANKS)
    return folder


def in_8_bits(folder):
    """The weights of a network, those of its matrices in 8 bits, and their scales; marks are left out."""
    tensors = load_file(folder / WEIGHTS)
    if "scaled_fp8" not in tensors:
        return original_formats.in_8_bits(tensors)
    scales = {name.removesuffix(".scale_weight"): x for name, x in tensors.items() if name.endswith(".scale_weight")}
    marks = ("scaled_fp8", ".scale_weight", ".scale_input")
    return {name: x for name, x in tensors.items() if not name.endswith(marks)}, scales


def inputs(name):
    generator = torch.Generator().manual_seed(2)
    config = NETWORKS[name]
    made = {
        "latent": torch.randn(1, config.get("in_channels", 16), 2, 4, 6, generator=generator),
        "timestep": torch.tensor([700.0]),
        "text": torch.randn(1, 12, tiny_models.TEXT_DIM, generator=generator),
    }
    if "image_dim" in config:
        images = 2 if "pos_embed_seq_len" in config else 1
        made["image"] = torch.randn(images, 257, config["image_dim"], generator=generator)
    return made


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def told(folder, case):
    """What each rank tells of the case."""
    return [json.loads((folder / f"told-{rank}.json").read_text())[case] for rank in range(RANKS)]


@pytest.fixture
def whole(folder, case):
    """The case's network on one rank, in its dtype, filled by diffusers' own hands."""
    dtype = getattr(torch, CASES[case]["dtype"])
    path = folder / CASES[case]["network"]
    network = WanTransformer(json.loads((path / "config.json").read_text())).eval()
    tensors = load_file(path / WEIGHTS)
    if CASES[case]["network"] == "8 bits":
        tensors = original_formats.dequantized(*in_8_bits(path))
    network.load_state_dict(
        {name: x if keeps_fp32(name) else x.to(dtype) for name, x in tensors.items()}, strict=True, assign=True
    )
    return network


def test_equals_one_rank(folder, case, whole):
    dtype = getattr(torch, CASES[case]["dtype"])
    with torch.no_grad():
        made = {name: x if name == "timestep" else x.to(dtype) for name, x in inputs(CASES[case]["network"]).items()}
        expected = tiny_models.velocity(whole, **made)
    assert expected.std() > 0.1
    if CASES[case]["fsdp"]:
        tolerance = 0.0  # the same weights in the same layers
    else:
        tolerance = 1e-4 if dtype == torch.float32 else 0.05 * expected.float().std().item()
    for rank in range(RANKS):
        velocity = load_file(folder / f"out-{rank}.safetensors")[case]
        assert_close(velocity, expected, atol=tolerance, rtol=0.0)


def test_the_dtypes_are_those_of_one_rank(told, whole):
    expected = {name: str(p.dtype) for name, p in whole.named_parameters()}
    assert all(rank["dtypes"] == expected for rank in told)


def test_a_rank_reads_its_part_and_no_more(folder, case, told, whole):
    """On disk all is fp32, or in 8 bits, where the scale of each comes along."""
    path, scales = folder / CASES[case]["network"], {}
    if CASES[case]["network"] == "8 bits":
        _, scales = in_8_bits(path)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name, _ in whole.named_parameters()}
    sizes = {name: 1 if dtype.startswith("F8") else 4 for name, dtype in dtypes.items()}
    for rank, told_by in enumerate(told):
        expected = sum(sizes[name] * math.prod(shape) for name, shape in parts(case, whole, rank).items())
        assert told_by["read"] == expected + 4 * len(scales), f"rank {rank}"
    everything = sum(sizes[name] * p.numel() for name, p in whole.named_parameters())
    assert max(rank["read"] for rank in told) < 0.6 * everything


def test_a_rank_keeps_its_part_and_no_more(case, told, whole):
    dtypes = {name: p.dtype for name, p in whole.named_parameters()}
    for rank, told_by in enumerate(told):
        expected = sum(math.prod(shape) * dtypes[name].itemsize for name, shape in parts(case, whole, rank).items())
        assert told_by["kept"] == expected, f"rank {rank}"


def parts(case, whole, rank):
    """The shape that a rank is to hold of each parameter, written out for these networks."""
    shapes = {}
    for name, parameter in whole.named_parameters():
        shape = list(parameter.shape)
        if CASES[case]["fsdp"]:
            if not replicated(name):
                chunk = -(-shape[0] // RANKS)
                shape[0] = max(0, min(chunk, shape[0] - rank * chunk))
        elif name.startswith("blocks."):
            rows = ("to_q", "to_k", "to_v", "k_proj", "v_proj", "net.0.proj", "norm_q", "norm_k", "norm_added_k")
            if name.rpartition(".")[0].endswith(rows):
                shape[0] //= RANKS
            elif name.endswith(("to_out.0.weight", "net.2.weight")):
                shape[1] //= RANKS
        shapes[name] = shape
    return shapes


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case["fsdp"]], indirect=True)
def test_a_forward_holds_two_blocks_beside_the_part(told, whole):
    block = sum(p.nbytes for name, p in whole.blocks[0].named_parameters() if not replicated(name))
    ends = sum(p.nbytes for layer in (whole.patch_embedding, whole.proj_out) for p in layer.parameters())
    computed = 300_000  # what the layers exchange: 12 tokens, 12 of text, 514 of two images
    prompt = 12 + (514 if whole.config.image_dim else 0)  # tokens, whose keys and values stay
    computed += LAYERS * 2 * prompt * 104 * whole.proj_out.weight.itemsize
    padding = 4 * sum(p[0].numel() for p in whole.parameters())  # FSDP2's: shares of one size
    for told_by in told:
        assert told_by["held"] <= told_by["kept"] + 2 * block + ends + padding + computed
        assert told_by["held"] >= told_by["kept"] + 2 * block, "the test sees what is held"
    assert told[0]["held"] - computed < 0.75 * sum(p.nbytes for p in whole.parameters())


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case["fsdp"]], indirect=True)
def test_the_next_block_travels_while_one_computes(told):
    """When a block begins, the ends, the two parts of the embedders, it and the next one have been asked for."""
    for told_by in told:
        asked_for = [begun / (RANKS - 1) for begun in told_by["begun"]]
        assert asked_for == [min(block + 5, LAYERS + 3) for block in range(LAYERS)]


def test_a_rank_sends_what_the_formulas_say(case, told, whole):
    itemsize = getattr(torch, CASES[case]["dtype"]).itemsize
    if CASES[case]["fsdp"]:  # of each row that is gathered, the shares of all others
        rows = {name: -(-p.shape[0] // RANKS) * p[0].numel() for name, p in whole.named_parameters()}
        expected = (RANKS - 1) * sum(
            n * (4 if keeps_fp32(name) else itemsize) for name, n in rows.items() if not replicated(name)
        )
        operations = {"send", "recv_"}
    else:
        tokens, text, image = 12, 12, 257 if whole.config.image_dim else 0
        block = 3 * tokens * 156 * itemsize + 4 * (3 * tokens + text + image)
        expected = LAYERS * block * 2 * (RANKS - 1) / RANKS
        operations = {"allreduce_"}
    for told_by in told:
        assert {name for name, _ in told_by["sent"]} == operations
        assert abs(sum(sent for _, sent in told_by["sent"]) - expected) < 100  # each exchange is counted in whole bytes


def test_nothing_stays_when_the_network_is_gone(told):
    for told_by in told:
        assert told_by["left"] < 0.01 * told_by["kept"]  # Gloo lets go of what it sent last when it comes to it
        assert told_by["notes"] == 0
