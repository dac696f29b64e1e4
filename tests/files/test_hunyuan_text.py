"""HunyuanVideo's prompts and images are encoded as diffusers and transformers do, from the files of every system."""

import importlib
import json
import shutil

import hunyuan_encoders as encoders
import original_formats as formats
import pytest
import tiny_llava
import torch
from ascend_runtime import TextEncoderSpec
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.models.family import TEXT_ENCODER, TEXT_ENCODER_2
from ascend_runtime.models.hunyuan_video.text.encoding import HunyuanText
from ascend_runtime.models.hunyuan_video.text.images import pixels_of
from ascend_runtime.recognition.text_encoders import find_text_encoders
from hunyuan_encoders import PROMPT, Diffusers, encoded, image, load, picture, vision
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel

# By core's tokenizer (Llama 3's), of the template and "A cat walks.": as diffusers' and the original's AutoTokenizer.
TEMPLATE_IDS = [
    128000, 128006, 9125, 128007, 271, 75885, 279, 2835, 555, 45293, 279, 2768, 13878, 25, 220, 16, 13, 578, 1925,
    2262, 323, 7057, 315, 279, 2835, 13, 17, 13, 578, 1933, 11, 6211, 11, 1404, 11, 10651, 11, 12472, 11, 1495, 11,
    323, 29079, 12135, 315, 279, 6302, 13, 18, 13, 27820, 11, 4455, 11, 28198, 37015, 12135, 11, 7106, 7351, 4442,
    315, 279, 6302, 13, 19, 13, 4092, 4676, 11, 3177, 11, 1742, 323, 16975, 13, 20, 13, 6382, 27030, 11, 19567, 11,
    323, 34692, 1511, 304, 279, 2835, 25, 128009, 128006, 882, 128007, 271,
]  # fmt: skip
IMAGE_TEMPLATE_IDS = (
    [*TEMPLATE_IDS[:5], 128257, 198, *TEMPLATE_IDS[5:13], 4184, 311, 279, 5905, 2217, *TEMPLATE_IDS[13:91], 271]
    + TEMPLATE_IDS[91:]
)  # fmt: skip
CAT_IDS, OVER, ANSWER = [32, 8415, 23291, 13], 128009, [128006, 78191, 128007, 271]
LONG = "é x" * 150  # 600 tokens of the small tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava.save(tmp_path_factory.mktemp("text"), seed=5)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return tiny_llava.save(tmp_path_factory.mktemp("images"), images=True, seed=6)


@pytest.fixture(scope="module")
def theirs(folder):
    return Diffusers(folder)


@pytest.fixture(scope="module")
def theirs_with_images(image_folder):
    return Diffusers(image_folder, images=True)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


@pytest.fixture(scope="module")
def loaded_with_images(image_folder):
    """The text encoders, and the vision tower."""
    return load(image_folder), vision(image_folder)


@pytest.fixture(scope="module")
def expected(theirs):
    """By diffusers, of PROMPT."""
    text, pooled = theirs.encoded()
    assert text.std() > 0.1 and pooled.std() > 0.1
    return text, pooled


def assert_same(made, expected, atol=1e-5):
    for ours, theirs in zip(made, expected, strict=True):
        assert_close(ours, theirs, atol=atol * float(theirs.abs().max().clamp(min=1)), rtol=0)


def fitting(tokens):
    """A prompt of so many tokens of the small tokenizer."""
    return "ab" * (tokens // 2) + "c" * (tokens % 2)


# What is encoded


@pytest.mark.parametrize("prompt", [
    PROMPT, "", "x", fitting(255), fitting(256), fitting(257), LONG, "<|eot_id|> {} <image>",
])  # fmt: skip
def test_a_prompt_is_encoded_as_diffusers_does(loaded, theirs, prompt):
    """Up to the longest, whose end token is the last that fits, and beyond."""
    made = encoded(loaded, prompt)
    assert_same(made, theirs.encoded(prompt))
    assert made[0].shape[1] <= 256
    print(f"{len(prompt)} characters: {made[0].shape[1]} tokens")


def test_whitespace_around_a_prompt_changes_nothing(loaded):
    """As in the original. Diffusers does not remove it."""
    assert_same(encoded(loaded, f"\n\n {PROMPT}\t"), encoded(loaded), atol=0)


@pytest.mark.parametrize("prompt, interleave", [
    (PROMPT, 2), (PROMPT, 4), (LONG, 4), ("", 2), (fitting(251), 2), (fitting(252), 2), (fitting(254), 2),
])  # fmt: skip
def test_a_prompt_about_an_image_is_encoded_as_diffusers_does(
    loaded_with_images, theirs_with_images, prompt, interleave
):
    loaded, model = loaded_with_images
    made = encoded(loaded, prompt, picture(model, image(), interleave))
    given = {"image": encoders.as_pil(image()), "image_embed_interleave": interleave}
    assert_same(made, theirs_with_images.encoded(prompt, **given))
    assert 0 < made[0].shape[1] - 576 // interleave <= 252 + 1


def test_only_a_cut_of_the_llamas_prompt_is_reported(loaded_with_images):
    loaded, model = loaded_with_images
    for encoding, most in ((loaded.encoding, 256), (loaded.encoding.about(picture(model, image())), 252)):
        assert encoding.cut(loaded.encoders, fitting(most - 1)) == []
        (said,) = encoding.cut(loaded.encoders, fitting(600))
        assert said.startswith(f"The prompt has 600 tokens, but HunyuanVideo reads {most}: the text after '... ")


# Tokens


@pytest.fixture(scope="module")
def core(request):
    """Core ComfyUI's folders of tokenizers."""
    root = request.config.rootpath / ".cache" / "comfyui" / "comfy"
    if not root.is_dir():
        pytest.skip("needs ComfyUI in .cache/comfyui: scripts/lib comfyui")
    return {TEXT_ENCODER: root / "text_encoders" / "llama_tokenizer", TEXT_ENCODER_2: root / "sd1_tokenizer"}


def test_the_templates_tokens_are_exact(core):
    tokenizer = HunyuanText().tokenizer(TEXT_ENCODER, core[TEXT_ENCODER], core[TEXT_ENCODER])
    assert tokenizer.size == 128259

    def ids(template):
        return tokenizer(template.format("A cat walks."), truncation=False).input_ids[0].tolist()

    text, images = tiny_llava.TEMPLATES
    assert ids(text) == [*TEMPLATE_IDS, *CAT_IDS, OVER]
    assert ids(images) == [*IMAGE_TEMPLATE_IDS, *CAT_IDS, OVER, *ANSWER]
    assert len(TEMPLATE_IDS) == 95 and len(IMAGE_TEMPLATE_IDS) == 103


def test_cores_clip_tokenizer_equals_transformers(core, tmp_path):
    """It has no tokenizer.json."""
    assert not (core[TEXT_ENCODER_2] / "tokenizer.json").exists()
    ours = HunyuanText().tokenizer(TEXT_ENCODER_2, core[TEXT_ENCODER_2], core[TEXT_ENCODER_2])
    theirs = CLIPTokenizer.from_pretrained(core[TEXT_ENCODER_2])
    for prompt in ("A cat  walks.", "", "Größe: 12% ünïcode 猫", "word " * 100, "<|endoftext|>x", "don't STOP"):
        ids = theirs(prompt, truncation=True, max_length=77).input_ids
        assert ours(prompt, truncation=True, max_length=77).input_ids.tolist() == [ids], prompt
    assert ours.size == 49408


# Images


@pytest.mark.parametrize("size", [(336, 336), (150, 100), (101, 773), (1280, 720)])
def test_an_images_pixels_are_those_of_transformers(size):
    made = pixels_of(image(*size), 336)
    theirs = tiny_llava.image_processor()(encoders.as_pil(image(*size)), return_tensors="pt").pixel_values
    assert made.shape == (1, 3, 336, 336) and made.std() > 0.5
    assert_close(made, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_vision_towers_tokens_are_transformers(loaded_with_images, theirs_with_images):
    pixels = pixels_of(image(), 336)
    theirs = theirs_with_images.pipeline.text_encoder.model
    (expected,) = theirs.get_image_features(pixels, return_dict=True).pooler_output
    made = loaded_with_images[1](pixels)
    assert expected.std() > 0.1
    assert_same([made[0]], [expected])


# Files


def original(tmp_path, folder):
    return [encoders.save_original(tmp_path / "original", folder)], {}


def original_folders(tmp_path, folder):
    root = encoders.save_original(tmp_path / "original", folder)
    return [root / "text_encoder_2", root / "text_encoder"], {}


def single_files(tmp_path, folder):
    tiny_llava.save_llama_tokenizer(tmp_path / "tokenizer")
    tiny_llava.save_clip_tokenizer(tmp_path / "tokenizer_2", json_file=False)
    return encoders.save_files(tmp_path, folder), {}


def given_tokenizers(tmp_path, folder):
    llama, clip = encoders.save_files(tmp_path, folder)
    given = {"tokenizer_path": str(folder / "tokenizer"), "tokenizer_path_2": str(folder / "tokenizer_2")}
    return [clip, llama], given


def whole_file(tmp_path, folder):
    """Both in one file, with ComfyUI's prefixes and another network's tensors."""
    held = encoders.llama_tensors(folder, "text_encoders.llama.transformer.model.")
    held |= encoders.clip_tensors(folder, "text_encoders.clip_l.transformer.text_model.")
    held = {name: x for name, x in held.items() if name.startswith("text_encoders.")}
    save_file(held | {"vae.decoder.conv_in.weight": torch.randn(2)}, tmp_path / "whole.safetensors")
    _, given = given_tokenizers(tmp_path, folder)
    return [tmp_path / "whole.safetensors"], given


def one_of_both(tmp_path, folder):
    """A folder that has both, and a file that takes the place of its CLIP."""
    _, clip = encoders.save_files(tmp_path, folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = copy / "text_encoder_2" / "model.safetensors"
    save_file({name: torch.zeros_like(x) for name, x in load_file(other).items()}, other)
    return [copy, clip], {"tokenizer_path_2": str(folder / "tokenizer_2")}


FORMS = [original, original_folders, single_files, given_tokenizers, whole_file, one_of_both]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_the_files_is_read(tmp_path, folder, expected, form):
    paths, fields = form(tmp_path, folder)
    assert_same(encoded(load(*paths, **fields)), expected)


@pytest.mark.parametrize("save", [formats.save_old_mark, formats.save_new_mark], ids=["old mark", "new mark"])
def test_a_llama_in_8_bits_equals_its_twin(tmp_path, folder, save):
    _, fields = given_tokenizers(tmp_path, folder)
    tensors = {name: x for name, x in encoders.llama_tensors(folder).items() if name != "lm_head.weight"}
    kept, scales = formats.in_8_bits(tensors)
    save(tmp_path / "fp8.safetensors", kept, scales)
    save_file(formats.dequantized(kept, scales), tmp_path / "twin.safetensors")
    clip = tmp_path / "clip_l.safetensors"
    made, twin = (encoded(load(tmp_path / f"{name}.safetensors", clip, **fields)) for name in ("fp8", "twin"))
    assert_same(made, twin)


def test_what_is_not_read_is_not_held(loaded, loaded_with_images):
    names = {name for part in loaded.encoders.values() for name, _ in part.model.named_parameters()}
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    assert "norm.weight" not in names
    seen = {name for name, _ in loaded_with_images[1].named_parameters()}
    assert not any(name.startswith(("encoder.layers.2.", "post_layernorm")) for name in seen)


LLAVA_NAMES = {
    "language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head",
    "vision_tower.": "model.vision_tower.vision_model.", "multi_modal": "model.multi_modal",
}  # fmt: skip


def llava_names(tmp_path, image_folder):
    """As transformers named a LLaVA's tensors at other times."""
    held = load_file(image_folder / "text_encoder" / "model.safetensors")
    made = {}
    for name, tensor in held.items():
        for old, new in LLAVA_NAMES.items():
            name = name.replace(old, new)
        made[name] = tensor
    copy = shutil.copytree(image_folder, tmp_path / "named")
    save_file(made, copy / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("form", ["other names", "original", "single files"])
def test_every_form_of_the_files_with_a_vision_tower_is_read(tmp_path, image_folder, loaded_with_images, form):
    if form == "other names":
        paths, fields = [llava_names(tmp_path, image_folder)], {}
    elif form == "original":
        paths, fields = [encoders.save_original(tmp_path, image_folder, images=True)], {}
    else:
        save_file(encoders.vision_tensors(image_folder), tmp_path / "llava_llama3_vision.safetensors")
        fields = {"vision_path": str(tmp_path / "llava_llama3_vision.safetensors")}
        paths = [image_folder]
    expected = encoded(loaded_with_images[0], PROMPT, picture(loaded_with_images[1], image()))
    assert_same(encoded(load(*paths), PROMPT, picture(vision(*paths, **fields), image())), expected, atol=0)


# What is refused


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(name):
    def change(root, llama, clip):
        held = load_file(llama)
        save_file({key: x for key, x in held.items() if name not in key}, llama)
        return [llama, clip]

    return change


def both_clip(root, llama, clip):
    shutil.copy(clip, root / "again.safetensors")
    return [clip, root / "again.safetensors"]


def both_llama(root, llama, clip):
    shutil.copy(llama, root / "again.safetensors")
    return [llama, root / "again.safetensors"]


def umt5(root, llama, clip):
    import tiny_models  # noqa: PLC0415

    save_file(formats.original_umt5(tiny_models.umt5()), root / "umt5.safetensors")
    return root / "umt5.safetensors"


def qwen(root, llama, clip):
    held = load_file(llama)
    save_file(held | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}, llama)
    return [llama, clip]


def no_text(root, llama, clip):
    save_file({"a": torch.zeros(2)}, root / "strange.safetensors")
    return [llama, root / "strange.safetensors"]


def larger_tokenizer(root, llama, clip):
    held = load_file(llama)
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"][:300].clone()
    save_file(held, llama)
    return [llama, clip]


def exchanged_tokenizers(root, llama, clip):
    tiny_llava.save_clip_tokenizer(root / "tokenizer")
    return [llama, clip]


def with_tokenizer(change):
    def changed(root, llama, clip):
        change(root)
        return [llama, clip]

    return changed


SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
NEEDS_TWO = "A HunyuanVideo model needs two text encoders; the"
NO_TOKENIZER = "contains no tokenizer, and there is none next to it. Put the folder {} of .* or give {}, such as .*/{}"
REFUSED = {
    "only the llama": (lambda root, llama, clip: [llama], "is a HunyuanVideo Llama text encoder. "
                       f"{NEEDS_TWO} CLIP-L text encoder is missing: give clip_l.safetensors of .* as path_2"),
    "only CLIP": (lambda root, llama, clip: [clip], "is a CLIP-L text encoder. "
                  f"{NEEDS_TWO} HunyuanVideo Llama text encoder is missing: give llava_llama3"),
    "both CLIP": (both_clip, "are both a CLIP-L text encoder"),
    "both llama": (both_llama, "are both a HunyuanVideo Llama text encoder"),
    "Wan's and CLIP": (lambda *a: [umt5(*a), a[2]], "is a CLIP-L text encoder, which is not used: a Wan"),
    "Wan's and the llama": (lambda *a: [umt5(*a), a[1]], "they belong to different models"),
    "a Qwen": (qwen, "is not a plain HunyuanVideo Llama text encoder. It is a Qwen 2.5, as HunyuanVideo 1.5"),
    "no encoder": (no_text, "strange.safetensors is not a UMT5 text .* and not a HunyuanVideo Llama text encoder"),
    "no layer": (without("layers.1.mlp.up_proj"), "1 missing: layers.1.mlp.up_proj.weight"),
    "a cut file": (without("model.norm"), "lacks norm.weight"),
    "a larger tokenizer": (larger_tokenizer, "tokenizer has 311 tokens, but .* embeddings for 300.*llama_tokenizer"),
    "CLIP's tokenizer": (exchanged_tokenizers, "is the tokenizer of another model: HunyuanVideo's template"),
    "no tokenizer": (with_tokenizer(lambda root: shutil.rmtree(root / "tokenizer")),
                     NO_TOKENIZER.format("tokenizer", "tokenizer_path", "llama_tokenizer")),
    "no second tokenizer": (with_tokenizer(lambda root: shutil.rmtree(root / "tokenizer_2")),
                            NO_TOKENIZER.format("tokenizer_2", "tokenizer_path_2", "sd1_tokenizer")),
    "an empty folder": (with_tokenizer(lambda root: [file.unlink() for file in (root / "tokenizer_2").iterdir()]),
                        "has neither tokenizer.json nor vocab.json with merges.txt"),
    "code": (with_tokenizer(lambda root: edit(root / "tokenizer" / "tokenizer_config.json", auto_map={"A": "b.py"})),
             "names code in its folder"),
    "a slow expression": (with_tokenizer(lambda root: edit(root / "tokenizer" / "tokenizer.json", pre_tokenizer=SLOW)),
                          "it splits words at"),
    "a Unigram": (with_tokenizer(lambda root: edit(root / "tokenizer" / "tokenizer.json", model={"type": "Unigram"})),
                  "does not hold the vocabulary of a byte-level BPE"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("sound")
    single_files(root, folder)
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, sound, case):
    root = shutil.copytree(sound, tmp_path / "files")
    change, says = REFUSED[case]
    paths = change(root, root / "llava_llama3_fp16.safetensors", root / "clip_l.safetensors")
    with pytest.raises(ValueError, match=f"(?s){says}"):
        load(*paths)


CONFIGS = {
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}, "num_hidden_layers": 10**6,
    "hidden_act": "gelu", "num_key_value_heads": 3, "attention_bias": True, "head_dim": "x", "rms_norm_eps": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("field", CONFIGS)
def test_a_config_of_another_llama_is_refused_by_its_field(tmp_path, folder, field):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "text_encoder" / "config.json", **{field: CONFIGS[field]})
    with pytest.raises(ValueError, match=rf"text_encoder[/\\]config.json.*({field}|2 heads cannot share 3 heads)"):
        load(copy)


def test_a_folder_or_file_without_a_vision_tower_is_refused(tmp_path, folder, image_folder):
    with pytest.raises(ValueError, match="has no LLaVA vision tower, such as llava_llama3_vision.* as vision_path"):
        vision(folder)
    held = encoders.vision_tensors(image_folder)
    save_file({name: x for name, x in held.items() if "linear_2" not in name}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="lacks multi_modal_projector.linear_2.weight of a LLaVA vision tower"):
        vision(folder, vision_path=str(tmp_path / "cut.safetensors"))


def test_the_order_of_two_files_does_not_matter(tmp_path, folder):
    files = encoders.save_files(tmp_path, folder)
    for path, path_2 in (files, files[::-1]):
        found = find_text_encoders(TextEncoderSpec(path=str(path), path_2=str(path_2)))
        assert [one.kind.name for one in found] == [TEXT_ENCODER, TEXT_ENCODER_2]
        assert [one.shards[0] for one in found] == list(files)


# Commands


def converted(source, target):
    plan = conversion.planned(source, "diffusers", None, "5GB")
    conversion.convert(plan, target, {"source": str(source)})
    return plan.omitted


def test_a_converted_llama_is_whole_for_transformers(tmp_path, folder):
    """Also its layers that are not read here, and without the head."""
    llama, clip = encoders.save_files(tmp_path, folder)
    for file, kind, name in ((llama, LlamaModel, "text_encoder"), (clip, CLIPTextModel, "text_encoder_2")):
        omitted = converted(file, tmp_path / name)
        assert omitted == [f"{name.replace('text_encoder', 'tokenizer')}: there is none in the text encoder's file or "
                           "next to it"]  # fmt: skip
        made, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = kind.from_pretrained(folder / name).state_dict()
        state = made.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_converted_folder_makes_the_same_text(tmp_path, folder, image_folder, expected, loaded_with_images):
    for name, source in (("diffusers", folder), ("original", encoders.save_original(tmp_path / "source", folder))):
        converted(source, tmp_path / name)
        assert_same(encoded(load(tmp_path / name)), expected)
    omitted = converted(image_folder, tmp_path / "images")
    assert omitted[0] == "text_encoder: copied unchanged, as it has a vision tower too"
    assert_same(encoded(load(tmp_path / "images")), encoded(loaded_with_images[0]), atol=0)
    assert vision(tmp_path / "images").sizes.tokens == 576


def test_a_converted_pipeline_names_a_tokenizer_that_keeps_spaces(tmp_path, folder):
    """transformers' LlamaTokenizerFast, which published pipelines name, drops them in release 5."""
    converted(encoders.save_original(tmp_path / "source", folder), tmp_path / "made")
    library, name = json.loads((tmp_path / "made" / "model_index.json").read_text())["tokenizer"]
    tokenizer = getattr(importlib.import_module(library), name).from_pretrained(tmp_path / "made" / "tokenizer")
    wanted = tiny_llava.llama_tokenizer()
    for template in tiny_llava.TEMPLATES:
        assert tokenizer(template.format(PROMPT)).input_ids == wanted.encode(template.format(PROMPT)).ids


def test_inspect_knows_the_files(tmp_path, folder, image_folder, capsys):
    llama, clip = encoders.save_files(tmp_path, folder)
    save_file(encoders.vision_tensors(image_folder), tmp_path / "vision.safetensors")
    seeing = tmp_path / "vision.safetensors"
    for file, part in ((llama, "text_encoder"), (clip, "text_encoder_2"), (seeing, "vision_tower")):
        found = list(inspection.inspect(str(file)))
        assert [(one.part, one.fault) for one in found] == [(part, None)]
    assert inspection.run(type("Arguments", (), {"path": str(folder)})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("complete")] == ["text_encoder", "text_encoder_2"]
