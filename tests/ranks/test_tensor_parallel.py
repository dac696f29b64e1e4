"""Slices and shares of the weights through the runtime: what can be cut, what is read again, and other files."""

import json
import shutil
from types import SimpleNamespace

import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, ParallelSpec, SampleSpec
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import cut_dim
from benchmarks.opens import Opened
from torch.testing import assert_close

SHAPE = (1, 16, 2, 4, 6)


def sample(runtime, model, text, parallel=None, seed=1, **hooks):
    spec = SampleSpec(steps=2, seed=seed, guidance_scale=4.0)
    return runtime.sample(model, spec, torch.zeros(SHAPE), text, -text, parallel=parallel, **hooks).tensor


def test_what_is_cut_of_the_published_networks():
    """Of each block: what makes heads or the inner width along dim 0, what reads them along dim 1."""
    config = dict(tiny_models.wan_transformer(image_dim=40, added_kv_proj_dim=96).config)
    cuts = {name: cut_dim(name) for name, _ in WanTransformer(config).named_parameters()}
    block = {name.removeprefix("blocks.1."): dim for name, dim in cuts.items() if name.startswith("blocks.1.")}
    assert {name for name, dim in block.items() if dim == 1} == {
        "attn1.to_out.0.weight", "attn2.to_out.0.weight", "ffn.net.2.weight"
    }  # fmt: skip
    assert {name for name, dim in block.items() if dim is None} == {
        "attn1.to_out.0.bias", "attn2.to_out.0.bias", "ffn.net.2.bias", "norm2.weight", "norm2.bias",
        "scale_shift_table",
    }  # fmt: skip
    assert not any(dim is not None for name, dim in cuts.items() if not name.startswith("blocks."))


@pytest.mark.parametrize("heads, ffn, degree, says", [
    (40, 13824, 3, ["tp_degree is 3", "40 heads", "width 13824", "1, 2, 4, 8"]),  # 14B
    (12, 8960, 8, ["tp_degree is 8", "12 heads", "width 8960", "1, 2, 4;"]),  # 1.3B
    (24, 14336, 16, ["tp_degree is 16", "24 heads", "width 14336", "1, 2, 4, 8;"]),  # 5B
])  # fmt: skip
def test_degrees_that_do_not_cut_a_model(heads, ffn, degree, says):
    config = {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": 1}
    error = str(pytest.raises(ValueError, WanTransformer, config, SimpleNamespace(degree=degree)).value)
    assert all(part in error for part in says), error


def test_all_ranks_refuse_such_a_model_and_live_on(two_ranks, specs, tmp_path):
    tiny_models.wan_transformer(ffn_dim=161).save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    odd, pids = DiffusionModelSpec(path=str(tmp_path)), two_ranks.pids
    for call in (lambda plan: two_ranks.load(odd, parallel=plan),
                 lambda plan: sample(two_ranks, odd, specs.text(1), plan)):  # fmt: skip
        with pytest.raises(ValueError, match="tp_degree is 2.* 4 heads and its feed-forward width 161"):
            call(ParallelSpec(ranks=2, tp_degree=2))
    sample(two_ranks, odd, specs.text(1))
    assert two_ranks.pids == pids


@pytest.mark.parametrize("tp, ranks, plan", [
    (1, 8, "2 x 1 x 4 x 1"), (2, 8, "2 x 1 x 2 x 2"), (8, 8, "1 x 1 x 1 x 8"), (2, 2, "1 x 1 x 1 x 2"),
    (2, 1, "1 x 1 x 1 x 1"), (2, 3, "1 x 1 x 3 x 1"), (4, 6, "1 x 1 x 3 x 2"), (8, 4, "1 x 1 x 1 x 4"),
])  # fmt: skip
def test_with_automatic_ranks_the_degree_is_a_wish(tp, ranks, plan):
    """It is never above the one asked for, nor one that does not divide it."""
    assert str(ParallelSpec(tp_degree=tp).resolve(ranks, guided=True)) == plan


def test_no_plan_has_slices_unless_asked_for():
    for ranks in range(1, 65):
        for degrees in ({}, {"cfg_degree": 2}, {"cfg_degree": 1, "ring_degree": 1, "ulysses_degree": 1},
                        {"cfg_degree": 2, "ulysses_degree": 5}, {"ring_degree": 3, "ulysses_degree": 7}):  # fmt: skip
            assert ParallelSpec(**degrees).resolve(ranks, guided=True).tp == 1, (ranks, degrees)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """One file with the original's names, and a text that fits it."""
    path = random_wan.original_transformer(tmp_path_factory.mktemp("original") / "wan.safetensors")
    text = torch.randn(1, 20, random_wan.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    return DiffusionModelSpec(path=str(path)), text


@pytest.mark.parametrize("plan", [{"tp_degree": 2}, {"fsdp": True}], ids=["slices", "shares"])
def test_the_originals_single_file(two_ranks, one_rank, original, plan):
    expected = sample(one_rank, *original)
    assert expected.std() > 0.1
    assert_close(sample(two_ranks, *original, ParallelSpec(ranks=2, **plan)), expected, atol=1e-4, rtol=0.0)


def test_in_bfloat16(two_ranks, one_rank, specs):
    """FSDP changes no digit, and slices no more than the order of a sum does."""
    model = DiffusionModelSpec(path=str(specs.folder), dtype="bfloat16")
    expected = sample(one_rank, model, specs.text(1))
    shared = sample(two_ranks, model, specs.text(1), ParallelSpec(ranks=2, fsdp=True, cfg_degree=2))
    assert torch.equal(shared, expected)
    sliced = sample(two_ranks, model, specs.text(1), ParallelSpec(ranks=2, tp_degree=2))
    assert (sliced - expected).abs().mean() < 0.05 * expected.std()


@pytest.fixture
def own(checkpoints, specs_of, tmp_path):
    """A checkpoint with two experts that is this test's alone, so that it is not loaded yet."""
    return specs_of(shutil.copytree(checkpoints(experts=2), tmp_path / "own"))


def test_a_changed_plan_reads_the_weights_again_where_it_must(two_ranks, one_rank, own):
    """A changed tp_degree or fsdp does; other degrees, and fsdp where a slice has one owner, do not."""
    plans = [
        ({"cfg_degree": 2}, True),
        ({"ulysses_degree": 2}, False),
        ({"cfg_degree": 2, "fsdp": True}, True),
        ({"ring_degree": 2, "fsdp": True}, False),
        ({"ulysses_degree": 2, "fsdp": True}, False),
        ({"tp_degree": 2}, True),
        ({"tp_degree": 2, "fsdp": True}, False),
        ({"cfg_degree": 2}, True),
    ]
    files = [own.folder / name / "diffusion_pytorch_model.safetensors" for name in ("transformer", "transformer_2")]
    tensors = 2 * len(WanTransformer(json.loads((files[0].parent / "config.json").read_text())).state_dict())
    expected = sample(one_rank, own.model, own.text(1))
    for plan, read_again in plans:
        told = []
        with Opened(files) as opened:
            latent = sample(two_ranks, own.model, own.text(1), ParallelSpec(ranks=2, **{"fsdp": False} | plan),
                            on_progress=lambda stage, *_: told.append(stage))  # fmt: skip
        assert told.count("load") == (tensors if read_again else 0), plan
        assert bool(opened.files()) == read_again, plan
        assert_close(latent, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("plan", [{"tp_degree": 2}, {"fsdp": True}], ids=["slices", "shares"])
def test_loaded_ahead_and_freed(two_ranks, own, plan):
    plan = ParallelSpec(ranks=2, **plan)
    two_ranks.load(own.model, parallel=plan)
    files = sorted(own.folder.glob("transformer*/*.safetensors"))
    with Opened(files) as opened:
        before = sample(two_ranks, own.model, own.text(1), plan)
    assert opened.files() == []
    two_ranks.free()
    with Opened(files) as opened:
        assert torch.equal(sample(two_ranks, own.model, own.text(1), plan), before)
    assert opened.files()
