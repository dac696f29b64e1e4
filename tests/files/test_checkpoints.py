"""The folders and single files of diffusers' and the original's names give the same network."""

import json

import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime.models.wan.files.names import to_diffusers_name
from ascend_runtime.recognition.layout import find_transformer
from ascend_runtime.checkpoints.reader import check_weights, load_weights
from ascend_runtime.models.wan.transformer import WanTransformer
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file


def read(path):
    """The transformer at `path`, in fp32."""
    found = find_transformer(str(path))
    model = WanTransformer(found.config)
    places = check_weights(model, found.shards, found.rename)
    load_weights(model, places, dtype_of=lambda name: torch.float32, device=torch.device("cpu"))
    return model


def assert_same(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_with_the_originals_names(tmp_path, prefix):
    path = random_wan.original_transformer(tmp_path / "wan.safetensors")
    tensors = load_file(path)
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path)
    assert_same(read(path), convert_wan_transformer_to_diffusers(dict(tensors)))


def test_the_image_embedder_and_its_attention_too():
    """Every parameter of an image-to-video model of Wan 2.1, by the original's name."""
    parts = ["k_img.weight", "k_img.bias", "v_img.weight", "v_img.bias", "norm_k_img.weight"]
    names = [f"blocks.11.cross_attn.{part}" for part in parts]
    names += [f"img_emb.proj.{index}.{kind}" for index in (0, 1, 3, 4) for kind in ("weight", "bias")]
    converted = convert_wan_transformer_to_diffusers({name: torch.empty(0) for name in names})
    assert [to_diffusers_name(name) for name in names] == list(converted)
    theirs = tiny_models.wan_transformer(num_layers=12, image_dim=8, added_kv_proj_dim=96)
    assert set(converted) <= set(theirs.state_dict())


def test_a_folder_of_several_shards(tmp_path):
    theirs = tiny_models.wan_transformer(seed=3)
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    for path in (tmp_path, tmp_path / "transformer"):
        assert_same(read(path), theirs.state_dict())


def test_the_dtypes_of_the_parameters(tmp_path):
    """What diffusers keeps in fp32 stays so, also where the blocks are in bfloat16."""
    from ascend_runtime import DiffusionModelSpec
    from ascend_runtime.components import Components

    theirs = tiny_models.wan_transformer(seed=3)
    theirs.save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": None}))
    spec = DiffusionModelSpec(path=str(tmp_path), dtype="bfloat16")
    model = Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise
    for name, parameter in model.named_parameters():
        wide = any(part in name for part in theirs._keep_in_fp32_modules)
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
