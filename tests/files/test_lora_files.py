"""LoRA files as trainers write them: how strong each layer is, for which expert, and what is refused in words."""

import json
import math
import time

import pytest
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec
from ascend_runtime.models.wan.files.lora_names import LORA_NAMES
from ascend_runtime.recognition.lora.files import read_lora
from ascend_runtime.recognition.lora.changes import Difference
from ascend_runtime.components import Components
from safetensors.torch import save_file
from torch.testing import assert_close

Q, FFN = "blocks.0.attn1.to_q", "blocks.1.ffn.net.2"
DIM, WIDTH, RANK = 96, 160, 4


@pytest.fixture(scope="module")
def shapes():
    return shapes_of()


def shapes_of(**changes):
    return {name: tuple(x.shape) for name, x in tiny_models.wan_transformer(**changes).named_parameters()}


def pair(name, into=DIM, out=DIM, rank=RANK, down="lora_A", up="lora_B"):
    return {f"{name}.{down}.weight": torch.ones(rank, into), f"{name}.{up}.weight": torch.ones(out, rank)}


def two_layers(prefix="transformer."):
    return pair(f"{prefix}{Q}") | pair(f"{prefix}{FFN}", WIDTH)


def saved(folder, tensors, name="lora.safetensors", header=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata=header and {"lora_adapter_metadata": json.dumps(header)})
    if config is not None:
        (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / name


def scales(file, shapes, expert=None):
    return {name: change.scale for name, change in read_lora(file, shapes, LORA_NAMES, expert).changes.items()}


# alpha and rank that are not in the tensors

CONFIGS = {
    "alpha / r": ({"r": RANK, "lora_alpha": 16}, 4.0, 4.0),
    "alpha / sqrt(r)": ({"r": RANK, "lora_alpha": 16, "use_rslora": True}, 8.0, 8.0),
    "a layer's own alpha": ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5, 2.0),
    "a whole name": ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {f"^{Q}": 2, "^to_q": 9, "net.2": 4}}, 0.5, 1.0),
    "dots that are escaped": ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {r".*\.net\.2$": 4}}, 2.0, 1.0),
    "the first that fits": ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"to_q": 2, Q: 4}}, 0.5, 2.0),
    "layers of another rank": ({"r": 9, "lora_alpha": 18, "rank_pattern": {"to_q": RANK, "net.2": RANK}}, 4.5, 4.5),
}  # fmt: skip


@pytest.mark.parametrize("said", CONFIGS)
def test_alpha_is_where_trainers_write_it(tmp_path, shapes, said):
    """In the header as diffusers packs it, as a model saves it itself, and in PEFT's own folder: by PEFT's formula."""
    config, of_q, of_ffn = CONFIGS[said]
    expected = {f"{Q}.weight": of_q, f"{FFN}.weight": of_ffn}
    packed = {f"transformer.{name}": value for name, value in config.items()}
    folder = saved(tmp_path / "peft", two_layers("base_model.model."), "adapter_model.safetensors", config=config)
    in_headers = saved(tmp_path, two_layers(), "packed", packed), saved(tmp_path, two_layers(""), "own", config)
    for file in (*in_headers, folder):
        assert scales(file, shapes) == pytest.approx(expected), file
        assert read_lora(file, shapes, LORA_NAMES).warning == ""


def test_alpha_in_a_tensor_comes_first(tmp_path, shapes):
    tensors = two_layers() | {f"transformer.{Q}.alpha": torch.tensor(8.0)}
    file = saved(tmp_path, tensors, header={"transformer.r": RANK, "transformer.lora_alpha": 16})
    assert scales(file, shapes) == {f"{Q}.weight": 2.0, f"{FFN}.weight": 4.0}


def test_kohyas_header_is_not_alpha(tmp_path, shapes):
    """kohya's own software takes the rank where a file has no alpha, whatever its header says."""
    tensors = pair("lora_unet_blocks_0_self_attn_q", down="lora_down", up="lora_up")
    save_file(tensors, tmp_path / "kohya", metadata={"ss_network_alpha": "1", "ss_network_dim": "4"})
    assert scales(tmp_path / "kohya", shapes) == {f"{Q}.weight": 1.0}


def test_a_configuration_that_was_lost_is_missed(tmp_path, shapes):
    renamed = saved(tmp_path / "b", two_layers("base_model.model."), config={"r": RANK, "lora_alpha": 16})
    for file in (saved(tmp_path / "a", two_layers(""), "adapter_model.safetensors"), renamed):
        made = read_lora(file, shapes, LORA_NAMES)
        assert {change.scale for change in made.changes.values()} == {1.0}
        assert "keeps alpha in adapter_config.json" in made.warning and "may differ" in made.warning


def test_a_changed_configuration_is_read_again(checkpoint, tmp_path):
    components, weights = Components(torch.device("cpu")), {}
    for alpha in (4, 12):
        file = saved(tmp_path, two_layers("base_model.model."), "adapter_model.safetensors",
                     config={"r": RANK, "lora_alpha": alpha})  # fmt: skip
        model = DiffusionModelSpec(path=str(checkpoint), loras=(LoraSpec(path=str(file)),))
        weights[alpha] = components.get(model, lambda *_: None).high_noise.get_parameter(f"{Q}.weight").clone()
    assert_close(weights[12] - weights[4], torch.full((DIM, DIM), 2.0 * RANK))


UNUSABLE = {
    "r is None, and must be a number": {"lora_alpha": 4},
    "lora_alpha is 'x', and must be a number": {"r": 4, "lora_alpha": "x"},
    "lora_alpha is True": {"r": 4, "lora_alpha": True},
    "the number Infinity": {"r": 4, "lora_alpha": math.inf},
    "r is 0": {"r": 0, "lora_alpha": 4},
    "2 without the magnitude of DoRA (lora_magnitude_vector), although": {"r": 4, "lora_alpha": 4, "use_dora": True},
    "sets fan_in_fan_out": {"r": 4, "lora_alpha": 4, "fan_in_fan_out": True},
    "it has PEFT's type 'LOKR'": {"peft_type": "LOKR", "r": 4, "alpha": 4},
    "init_lora_weights 'pissa' changes": {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"},
    "alpha_pattern must be a table": {"r": 4, "lora_alpha": 4, "alpha_pattern": [1]},
    "alpha_pattern has '(a+)+b'": {"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+b": 4}},
    "says that blocks.0.attn1.to_q has the rank 8, but its matrices have the rank 4": {"r": 8, "lora_alpha": 8},
    "it is not a JSON object": "[]",
    "JSONDecodeError|cannot be used": "{",
    "nest too deeply": "[" * 200_000,
    "at most 4194304": " " * (4 * 2**20 + 1),
}


@pytest.mark.parametrize("says", UNUSABLE)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path, shapes, says):
    config = UNUSABLE[says]
    file = saved(tmp_path, two_layers("base_model.model."), "adapter_model.safetensors", config=config)
    with pytest.raises(ValueError) as error:
        read_lora(file, shapes, LORA_NAMES)
    assert any(words in str(error.value) for words in says.split("|")), error.value
    assert "adapter_config.json" in str(error.value) or "use_dora" in str(error.value)


def test_a_header_of_another_part_is_no_strength_of_this(tmp_path, shapes):
    file = saved(tmp_path, two_layers(), header={"text_encoder.r": 4, "text_encoder.lora_alpha": 16})
    with pytest.raises(ValueError, match="lora_adapter_metadata cannot be used .it says nothing about the transformer"):
        read_lora(file, shapes, LORA_NAMES)


# Layers


def test_the_bias_of_b_is_scaled_as_the_product(tmp_path, shapes):
    tensors = two_layers() | {f"transformer.{Q}.lora_B.bias": torch.ones(DIM)}
    file = saved(tmp_path, tensors, header={"transformer.r": RANK, "transformer.lora_alpha": 2})
    changes = read_lora(file, shapes, LORA_NAMES).changes
    assert changes[f"{Q}.bias"] == Difference(f"transformer.{Q}.lora_B.bias", 0.5)
    tensors = {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones(DIM)}
    assert read_lora(saved(tmp_path, tensors), shapes, LORA_NAMES).changes[f"{Q}.bias"].scale == 1.0


def test_differences_of_modulation(tmp_path, shapes):
    """LightX2V's own name of them."""
    rows = {"blocks.1": 6, "head": 2}
    tensors = {f"diffusion_model.{name}.diff_m": torch.ones(1, count, DIM) for name, count in rows.items()}
    changes = read_lora(saved(tmp_path, tensors), shapes, LORA_NAMES).changes
    assert {name: change.key for name, change in changes.items()} == {
        "blocks.1.scale_shift_table": "diffusion_model.blocks.1.diff_m",
        "scale_shift_table": "diffusion_model.head.diff_m",
    }


ORIGINAL_Q = "blocks.0.self_attn.q"
SPELLED = [
    f"pipe.dit.{ORIGINAL_Q}", "lora_transformer_blocks_0_attn1_to_q", "lycoris_blocks_0_attn1_to_q",
    "lora_unet_blocks_0.self_attn.q", f"transformer.base_model.model.{Q}", f"base_model.model.transformer.{Q}",
    f"model.diffusion_model.{ORIGINAL_Q}", f"net.{ORIGINAL_Q}", f"model.{ORIGINAL_Q}", f"transformer_1.{Q}",
    f"diffusion_model.high_noise_model.{ORIGINAL_Q}", "_orig_mod.blocks.0._checkpoint_wrapped_module.self_attn.q",
    "blocks.0.self_attn.proj_q",
]  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_names_as_other_trainers_spell_them(tmp_path, shapes, name):
    file = saved(tmp_path, pair(name, down="lora_down", up="lora_up"))
    assert read_lora(file, shapes, LORA_NAMES).changes.keys() == {f"{Q}.weight"}


@pytest.mark.parametrize("adapter", [".default", ".style-2", ""])
@pytest.mark.parametrize("leaf", [".weight", ""])
def test_pefts_name_of_an_adapter(tmp_path, shapes, adapter, leaf):
    ends = {"lora_A": torch.ones(RANK, DIM), "lora_B": torch.ones(DIM, RANK), "lora_magnitude_vector": torch.ones(DIM)}
    tensors = {f"base_model.model.{Q}.{end}{adapter}{leaf}": tensor for end, tensor in ends.items()}
    (change,) = read_lora(saved(tmp_path, tensors), shapes, LORA_NAMES).changes.values()
    assert change.keys == tuple(f"base_model.model.{Q}.{end}{adapter}{leaf}" for end in
                                ("lora_B", "lora_A", "lora_magnitude_vector"))  # fmt: skip
    if adapter:
        two = {f"base_model.model.{Q}.lora_A.other{leaf}": torch.ones(RANK, DIM)}
        with pytest.raises(ValueError, match=r"1 given twice: base_model.*lora_A.* and base_model.*lora_A"):
            read_lora(saved(tmp_path, tensors | two), shapes, LORA_NAMES)


def test_what_is_for_text_encoders_is_left_out_in_words(tmp_path, shapes):
    """Trainers write it into the same file."""
    others = pair("lora_te1_layers_0_self_attn_q_proj", down="lora_down", up="lora_up") | pair(
        "text_encoder.layers.0.q", 8, 8) | {"bundle_emb.cat.t5_out": torch.ones(2, 8)}  # fmt: skip
    made = read_lora(saved(tmp_path, two_layers() | others), shapes, LORA_NAMES)
    assert made.changes.keys() == {f"{Q}.weight", f"{FFN}.weight"}
    assert "5 of text encoders, which LoRAs do not change here: bundle_emb.cat.t5_out" in made.warning
    with pytest.raises(ValueError, match="none of its 5 tensors fits. Tensors 5 of text encoders"):
        read_lora(saved(tmp_path, others), shapes, LORA_NAMES)


def test_mindspeeds_alpha_is_in_a_file_next_to_it(tmp_path, shapes):
    """It is an option of MindSpeed-MM's commands, and in no file that they write."""
    state = {"model": pair(f"{ORIGINAL_Q.replace('.q', '.proj_q')}", down="lora_A.default", up="lora_B.default")}
    for name in ("mm_lora.pt", "adapter_model.pt"):
        torch.save(state, tmp_path / name)
        with pytest.raises(ValueError, match="MindSpeed-MM, which does not write alpha into it. Name the file"):
            read_lora(tmp_path / name, shapes, LORA_NAMES)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 16}))
    assert scales(tmp_path, shapes) == {f"{Q}.weight": 4.0}


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"]
)
def test_a_folder_as_peft_and_diffusers_write_it(tmp_path, shapes, name):
    config = {"r": RANK, "lora_alpha": 8, "lora_bias": True}
    tensors = two_layers("base_model.model.") | {f"base_model.model.{Q}.lora_B.bias": torch.ones(DIM)}
    saved(tmp_path, tensors, name, {"transformer.r": RANK, "transformer.lora_alpha": 8}, config)
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    made = read_lora(tmp_path, shapes, LORA_NAMES)
    assert made.path == tmp_path / name and not made.warning
    assert {name: change.scale for name, change in made.changes.items()} == dict.fromkeys(
        (f"{Q}.weight", f"{Q}.bias", f"{FFN}.weight"), 2.0)  # fmt: skip
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds no LoRA. Give its file, or PEFT's folder, which holds one of adapter_"):
        read_lora(tmp_path, shapes, LORA_NAMES)


BROKEN_DORA = {  # what is wrong with a layer's tensors
    "magnitudes of both names": {"dora_scale": torch.ones(DIM, 1), "lora_magnitude_vector": torch.ones(DIM)},
    "no matrices": {"lora_A.weight": None, "lora_B.weight": None, "dora_scale": torch.ones(DIM, 1)},
    "a difference": {"lora_A.weight": None, "lora_B.weight": None, "diff": torch.ones(DIM, DIM),
                     "dora_scale": torch.ones(DIM, 1)},
    "another length": {"dora_scale": torch.ones(DIM + 1, 1)},
    "one number": {"dora_scale": torch.ones(1, 1)},
    "a matrix": {"dora_scale": torch.ones(DIM, DIM)},
    "inputs in PEFT's name": {"lora_magnitude_vector": torch.ones(2 * DIM)},
    "no number": {"dora_scale": torch.full((DIM, 1), torch.nan)},
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_DORA)
def test_a_broken_dora_is_refused_by_name(tmp_path, shapes, what):
    tensors = pair(f"transformer.{Q}") | {f"transformer.{Q}.{end}": x for end, x in BROKEN_DORA[what].items()}
    file = saved(tmp_path, {key: x for key, x in tensors.items() if x is not None})
    with pytest.raises(ValueError, match=rf"AV-1404: .*{Q}\.(dora_scale|lora_magnitude_vector)"):
        read_lora(file, shapes, LORA_NAMES)


BOTH = pair(f"transformer.{Q}") | pair(f"transformer_2.{Q}") | pair(f"transformer_2.{FFN}", WIDTH)


def test_each_expert_gets_its_own_layers(tmp_path, shapes):
    file = saved(tmp_path, BOTH)
    high, low = (read_lora(file, shapes, LORA_NAMES, expert) for expert in ("high_noise", "low_noise"))
    assert {change.up for change in high.changes.values()} == {f"transformer.{Q}.lora_B.weight"}
    assert {change.up for change in low.changes.values()} == {f"transformer_2.{x}.lora_B.weight" for x in (Q, FFN)}
    assert high.warning == low.warning == ""
    only = read_lora(file, shapes, LORA_NAMES)
    assert only.changes == high.changes
    assert "4 of a low-noise expert, which this model lacks: transformer_2" in only.warning
    for expert in ("high_noise", "low_noise"):  # without the other's, it is for whichever expert it is given to
        made = read_lora(saved(tmp_path, two_layers(), "one"), shapes, LORA_NAMES, expert)
        assert made.changes.keys() == low.changes.keys()


@pytest.mark.parametrize("high, low", [
    ("pipe.dit.", "pipe.dit2."), ("transformer_1.", "transformer_2."), ("high_noise_model.", "low_noise_model."),
    ("diffusion_model.high_noise.", "diffusion_model.low_noise."),
])  # fmt: skip
def test_both_experts_in_one_file_under_other_names(tmp_path, shapes, high, low):
    both = saved(tmp_path, pair(f"{high}{ORIGINAL_Q}") | pair(f"{low}blocks.1.ffn.2", WIDTH))
    read = {expert: read_lora(both, shapes, LORA_NAMES, expert) for expert in ("high_noise", "low_noise")}
    assert {expert: [*file.changes] for expert, file in read.items()} == {
        "high_noise": [f"{Q}.weight"], "low_noise": [f"{FFN}.weight"]}  # fmt: skip
    assert not any(file.warning for file in read.values())
    one = saved(tmp_path, pair(f"{high}{ORIGINAL_Q}"), "one")  # named as no other expert's
    changes = read_lora(one, shapes, LORA_NAMES, "low_noise").changes
    assert bool(changes) == (high == "pipe.dit.")


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_layers_of_both_experts_of_which_none_fits(tmp_path, shapes, expert):
    file = saved(tmp_path, pair(f"transformer.{Q}", 64, 64) | pair(f"transformer_2.{Q}", 64, 64))
    with pytest.raises(ValueError, match="none of its 4 tensors fits. It was made for a model with 64 channels"):
        read_lora(file, shapes, LORA_NAMES, expert)


def test_each_experts_own_alpha(tmp_path, shapes):
    header = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer_2.r": 4, "transformer_2.lora_alpha": 2}
    file = saved(tmp_path, BOTH, header=header)
    assert set(scales(file, shapes, "high_noise").values()) == {2.0}
    assert set(scales(file, shapes, "low_noise").values()) == {0.5}


def test_a_file_for_one_expert_in_a_model_of_two(checkpoints, tmp_path):
    folder = checkpoints(experts=2)
    path = str(saved(tmp_path, pair(f"transformer_2.{Q}")))

    def weights(*experts):
        loras = tuple(LoraSpec(path=path, expert=expert) for expert in experts)
        model = DiffusionModelSpec(path=str(folder), loras=loras)
        loaded = Components(torch.device("cpu")).get(model, lambda *_: None)
        return [expert.get_parameter(f"{Q}.weight") for expert in loaded.experts]

    before, after = weights(), weights("both")
    assert torch.equal(before[0], after[0])
    assert_close(after[1] - before[1], torch.full((DIM, DIM), float(RANK)))
    with pytest.raises(ValueError, match="the expert high_noise, but all its layers are for the other one. Set expert"):
        weights("high_noise")


def test_names_are_looked_at_as_far_as_names_go(tmp_path, shapes):
    """A file decides how long they are, and patterns take the square of that."""
    name, began = ".oft_a" * 200_000 + "!", time.monotonic()
    with pytest.raises(ValueError, match="holds a tensor with the invalid name '.oft_a.oft_a"):
        read_lora(saved(tmp_path, two_layers() | {name: torch.ones(1)}), shapes, LORA_NAMES)
    assert time.monotonic() - began < 5


# Files for other models, and of other formats


OTHERS = {
    "none of its 2 tensors fits. It was made for a model with 5120 channels (14B); this one has 96 channels.": pair(
        Q, 5120, 5120),
    "It was made for a model with 64 channels; this one has 96": pair(Q, 64, 64) | pair("blocks.0.ffn.0", 64, 160),
    "It was made for a text-to-video model (16 channels); this is an image-to-video model (36 channels)": {
        "diffusion_model.patch_embedding.diff": torch.ones(DIM, 16, 1, 2, 2)},
    "2 of layers of Wan VACE, which this model lacks": pair("vace_blocks.0.self_attn.q"),
    "2 of no layer of this model: blocks.9": pair("blocks.9.self_attn.q"),
    "2 of a low-noise expert, which this model lacks": pair(f"transformer_2.{Q}"),
}  # fmt: skip


@pytest.mark.parametrize("says", OTHERS)
def test_a_file_of_which_nothing_fits_is_refused(tmp_path, says):
    file = saved(tmp_path, OTHERS[says])
    with pytest.raises(ValueError) as error:
        read_lora(file, shapes_of(in_channels=36), LORA_NAMES)
    assert f"{file} is not a LoRA for this model" in str(error.value) and says in str(error.value), error.value


FORMATS = {
    "GLoRA (LyCORIS)": {"lora_unet_blocks_0_self_attn_q.a1.weight": torch.ones(DIM, 4)},
    "LyCORIS with a trained scalar": {"lora_unet_blocks_0_self_attn_q.scalar": torch.ones(1)},
    "OFT": {"lora_unet_blocks_0_self_attn_q.oft_blocks": torch.ones(4, 4)},
    "whole weights, which replace the model's": {"diffusion_model.blocks.0.self_attn.q.set_weight": torch.ones(4, 4)},
    "a change of a weight's shape": {"diffusion_model.patch_embedding.reshape_weight": torch.tensor([96, 36])},
    "Stand-In": {"diffusion_model.blocks.0.self_attn.q_loras.up.weight": torch.ones(DIM, 4)},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_are_not_merged_are_named(tmp_path, shapes, name):
    file = saved(tmp_path, two_layers() | FORMATS[name])
    with pytest.raises(ValueError) as error:
        read_lora(file, shapes, LORA_NAMES)
    assert f"{file} has an unsupported format. Tensors" in str(error.value) and f"of {name.strip()}" in str(error.value)


def test_what_changes_nothing_is_said(tmp_path, shapes):
    """alpha 0, and matrices of rank 0."""
    alpha = {f"transformer.{Q}.alpha": torch.tensor(0.0)}
    for name, tensors in (("a", pair(f"transformer.{Q}") | alpha), ("b", pair(f"transformer.{Q}", rank=0))):
        warning = read_lora(saved(tmp_path, tensors, name), shapes, LORA_NAMES).warning
        assert f"because alpha or the rank is 0: {Q}.weight" in warning


@pytest.mark.parametrize("alpha, says", [
    (torch.tensor(True), f"must be numbers: transformer.{Q}.alpha as torch.bool"),
    (torch.tensor(1e9), f"more than 10,000: transformer.{Q}.alpha by 2.5e+08"),
])  # fmt: skip
def test_an_alpha_that_is_none(tmp_path, shapes, alpha, says):
    file = saved(tmp_path, two_layers() | {f"transformer.{Q}.alpha": alpha})
    with pytest.raises(ValueError) as error:
        read_lora(file, shapes, LORA_NAMES)
    assert says in str(error.value) and str(file) in str(error.value)


def test_a_file_that_was_skipped_is_refused_if_so_asked(checkpoint, tmp_path):
    """Also in the same process, which knows the file."""
    path = str(saved(tmp_path, OTHERS["2 of layers of Wan VACE, which this model lacks"]))
    components = Components(torch.device("cpu"))

    def get(misfits):
        lora = LoraSpec(path=path, misfits=misfits)
        return components.get(DiffusionModelSpec(path=str(checkpoint), loras=(lora,)), lambda *_: None)

    for _ in range(2):
        (warning,) = get("skip").warnings
        assert "changes nothing, as none of its tensors fits: 2 of layers of Wan VACE" in warning
        with pytest.raises(ValueError, match="none of its 2 tensors fits"):
            get("refuse")
