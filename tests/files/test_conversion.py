"""`python -m ascend_runtime convert`: what is made equals what it is made of, whatever stops it on the way."""

import json
import os
import random
import resource
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import original_formats as formats
import pytest
import random_wan
import tiny_models
import torch
from ascend_runtime import DiffusionModelSpec, TextEncoderSpec
from ascend_runtime.commands import conversion
from ascend_runtime.checkpoints.writing import transfer, unfinished, writers
from ascend_runtime.recognition.layout import find_transformer, find_vae
from ascend_runtime.components import Components
from ascend_runtime.models.wan.weights import keeps_fp32
from ascend_runtime.specs.models import MODEL_FORMATS
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

RELEASE = Path("release", "mp_rank_00", "model_optim_rng.pt")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """By the original's names; seed 21."""
    file = random_wan.original_transformer(tmp_path_factory.mktemp("wan") / "wan", seed=21, layers=3)
    return load_file(file)


def arguments(source, target, to, dtype="keep", shard_size="5GB"):
    return Namespace(source=str(source), target=str(target), to=to, dtype=dtype, shard_size=shard_size)


def convert(source, target, to, **options):
    assert conversion.run(arguments(source, target, to, **options)) == 0
    assert not list(Path(target).parent.glob("*.partial"))
    return Path(target)


def by_diffusers_names(tensors):
    return convert_wan_transformer_to_diffusers(dict(tensors))


def assert_same(made, expected):
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def load(path, **spec):
    return Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(path), **spec), lambda *_: None)


def weights(folder, name="diffusion_pytorch_model.safetensors"):
    """Of a component's folder that is one file."""
    return load_file(folder / name)


# Transformers


@pytest.mark.parametrize("form", formats.WRITERS)
def test_both_layouts_hold_what_any_other_does(tmp_path, tensors, form):
    source = tmp_path / "source"
    formats.WRITERS[form](source, tensors)
    diffusers = convert(source, tmp_path / "diffusers", "diffusers")
    assert_same(WanTransformer3DModel.from_pretrained(diffusers).state_dict(), by_diffusers_names(tensors))
    mindspeed = convert(source, tmp_path / "mindspeed", "mindspeed")
    assert_same(torch.load(mindspeed / RELEASE, weights_only=True)["model"], formats.mindspeed_names(tensors))
    assert (mindspeed / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    for made in (diffusers, mindspeed):
        network = load(made, dtype="float32").high_noise
        assert_same(dict(network.named_parameters()), by_diffusers_names(tensors))


@pytest.mark.parametrize("form", formats.IN_8_BITS)
def test_8_bits_become_16_and_make_the_same_network(tmp_path, tensors, form):
    worth = by_diffusers_names(formats.IN_8_BITS[form](tmp_path / "source", tensors))
    folder = convert(tmp_path / "source", tmp_path / "made", "diffusers")
    for name, made in weights(folder).items():
        rounded = worth[name].ndim == 2 and not keeps_fp32(name)
        assert made.dtype == (torch.bfloat16 if rounded else torch.float32), name
        assert torch.equal(made, worth[name].float().to(made.dtype)), name
    before, after = (load(path, dtype="bfloat16").high_noise for path in (tmp_path / "source", folder))
    assert_same(dict(after.named_parameters()), dict(before.named_parameters()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_of_all_but_what_is_computed_in_fp32(tmp_path, tensors, dtype):
    held = {name: tensor.half() for name, tensor in tensors.items()}
    torch.save(held, tmp_path / "wan.pth")
    folder = convert(tmp_path / "wan.pth", tmp_path / "made", "diffusers", dtype=dtype)
    expected = {
        name: tensor.to(torch.float32 if keeps_fp32(name) and dtype != "fp16" else DTYPES[dtype])
        for name, tensor in by_diffusers_names(held).items()
    }
    assert_same(weights(folder), expected)


def test_names_of_a_model_that_sees_images(tmp_path):
    file = random_wan.original_transformer(tmp_path / "wan", seed=22, channels=36, image=True)
    folder = convert(file, tmp_path / "made", "mindspeed")
    expected = formats.mindspeed_names(load_file(file))
    assert "blocks.0.cross_attn.k_norm_img.weight" in expected
    assert_same(torch.load(folder / RELEASE, weights_only=True)["model"], expected)
    assert load(folder).high_noise.config["image_dim"] == random_wan.IMAGE_DIM
    assert_same(weights(convert(folder, tmp_path / "back", "diffusers")), by_diffusers_names(load_file(file)))


def test_shards_are_the_librarys_own(tmp_path, tensors):
    save_file(tensors, tmp_path / "wan")
    folder = convert(tmp_path / "wan", tmp_path / "made", "diffusers", shard_size="2MB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        save_file(load_file(shard), tmp_path / "library", metadata={"format": "pt"})
        assert shard.read_bytes() == (tmp_path / "library").read_bytes()
    assert_same(WanTransformer3DModel.from_pretrained(folder).state_dict(), by_diffusers_names(tensors))


# Models of several parts


def encoder_and_vae(folder):
    """What the original has beside its transformers, written there."""
    encoder, vae = tiny_models.umt5(), tiny_models.randomise(AutoencoderKLWan(base_dim=4), seed=23)
    torch.save(formats.original_umt5(encoder), folder / "models_t5.pth")
    torch.save(formats.original_vae(vae), folder / "Wan2.1_VAE.pth")
    shutil.copytree(tiny_models.TOKENIZER, folder / "google" / "umt5-xxl")
    return encoder, vae


def test_the_originals_folder_becomes_diffusers_pipeline_and_back(tmp_path, tensors, capsys):
    """Two experts, text encoder, tokenizer, VAE; then MindSpeed-MM's two folders."""
    source = tmp_path / "source"
    other = {name: tensor + 0.5 if name == "head.head.bias" else tensor for name, tensor in tensors.items()}
    formats.original_folder(source / "high_noise_model", tensors)
    formats.original_folder(source / "low_noise_model", other)
    encoder, vae = encoder_and_vae(source)
    folder = convert(source, tmp_path / "diffusers", "diffusers")
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.config.boundary_ratio == 0.875 and pipeline.scheduler.config.flow_shift == 12.0
    assert pipeline.tokenizer("red").input_ids == AutoTokenizer.from_pretrained(tiny_models.TOKENIZER)("red").input_ids
    assert_same(pipeline.transformer.state_dict(), by_diffusers_names(tensors))
    assert_same(pipeline.transformer_2.state_dict(), by_diffusers_names(other))
    assert_same(pipeline.text_encoder.state_dict(), encoder.state_dict())
    assert_same(pipeline.vae.state_dict(), vae.state_dict())
    assert "left out" not in capsys.readouterr().out
    mindspeed = convert(folder, tmp_path / "mindspeed", "mindspeed")
    told = capsys.readouterr().out
    assert "omitted: text_encoder" in told and "omitted: vae" in told
    model = load(mindspeed, dtype="float32", experts="resident")
    assert_same(dict(model.high_noise.named_parameters()), by_diffusers_names(tensors))
    assert_same(dict(model.low_noise.named_parameters()), by_diffusers_names(other))
    again = convert(mindspeed, tmp_path / "again", "diffusers")
    assert_same(weights(again / "transformer_2"), weights(folder / "transformer_2"))
    assert json.loads((again / "model_index.json").read_text())["vae"] == [None, None]
    pipeline = WanPipeline.from_pretrained(again, vae=vae, text_encoder=encoder, tokenizer=pipeline.tokenizer)
    assert_same(pipeline.transformer_2.state_dict(), by_diffusers_names(other))


def test_the_originals_image_to_video(tmp_path, capsys):
    tensors = load_file(random_wan.original_transformer(tmp_path / "wan", seed=25, channels=36, image=True))
    source = formats.original_folder(tmp_path / "source", tensors)
    encoder_and_vae(source)
    folder = convert(source, tmp_path / "made", "diffusers")
    assert "omitted: image_encoder: CLIP is not converted" in capsys.readouterr().out
    pipeline = WanImageToVideoPipeline.from_pretrained(folder)
    assert pipeline.image_encoder is None and pipeline.scheduler.config.flow_shift == 5.0
    assert_same(pipeline.transformer.state_dict(), by_diffusers_names(tensors))


def test_a_diffusers_folder_keeps_what_lies_in_it(tmp_path, checkpoints):
    source = shutil.copytree(checkpoints(experts=2), tmp_path / "source")
    (source / "vae" / "latent_rgb.json").write_text("{}")
    folder = convert(source, tmp_path / "made", "diffusers", dtype="bf16")
    for file in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json",
                 "vae/latent_rgb.json"):  # fmt: skip
        assert (folder / file).read_bytes() == (source / file).read_bytes(), file
    assert_same(weights(folder / "vae"), weights(source / "vae"))
    made = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype="auto")
    assert made.dtype == torch.bfloat16
    expected = UMT5EncoderModel.from_pretrained(source / "text_encoder", dtype=torch.bfloat16)
    assert_same(made.state_dict(), expected.state_dict())
    assert WanPipeline.from_pretrained(folder).config.boundary_ratio == 0.875


def test_a_text_encoders_file_brings_its_tokenizer(tmp_path):
    encoder, words = tiny_models.umt5(vocabulary=40), formats.sentencepiece_model()
    save_file(formats.comfyui_umt5(encoder, words, torch.float16), tmp_path / "umt5.safetensors")
    folder = convert(tmp_path / "umt5.safetensors", tmp_path / "made", "diffusers")
    expected = {name: tensor.half().float() for name, tensor in encoder.state_dict().items()}
    assert_same(UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).state_dict(), expected)
    assert {x.dtype for x in weights(folder / "text_encoder", "model.safetensors").values()} == {torch.float16}
    read = [Components(torch.device("cpu")).get(TextEncoderSpec(path=str(path)), lambda *_: None)
            for path in (tmp_path / "umt5.safetensors", folder)]  # fmt: skip
    read = [loaded.encoders["text_encoder"] for loaded in read]
    assert_same(read[1].model.state_dict(), read[0].model.state_dict())
    asked = {"max_length": 512, "truncation": True}
    prompts = "a red circle moving right", "green", "", "yellow 1"
    source, made = ([one.tokenizer(prompt, **asked).input_ids.tolist() for prompt in prompts] for one in read)
    assert made == source
    pytest.importorskip("google.protobuf")  # which transformers reads a sentencepiece model with
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert [theirs(prompt, return_tensors="pt", **asked).input_ids.tolist() for prompt in prompts] == source


@pytest.mark.parametrize("residual", [False, True])
def test_a_vaes_file(tmp_path, residual):
    patched = {"z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True,
               "decoder_base_dim": 4, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48,
               "latents_std": [1.0] * 48}  # fmt: skip
    vae = tiny_models.randomise(AutoencoderKLWan(base_dim=4, **(patched if residual else {})), seed=24)
    torch.save(formats.original_vae(vae), tmp_path / "vae.pth")
    folder = convert(tmp_path / "vae.pth", tmp_path / "made", "diffusers")
    assert_same(AutoencoderKLWan.from_pretrained(folder).state_dict(), vae.state_dict())
    assert find_vae(str(folder)).config.items() >= find_vae(str(tmp_path / "vae.pth")).config.items()


# Stopped on the way


class Deaths:
    """Kills this process at its nth touch of the disk, a write of weights in its middle; None: counts them."""

    def __init__(self, patch, at=None):
        self.count, self._at = 0, at
        places = ((transfer, "write_at"), (transfer, "lay_out"), (transfer, "sync"), (conversion, "sync"),
                  (unfinished, "sync"), (unfinished.Unfinished, "record"), (Path, "rename"), (shutil, "copyfile"),
                  (shutil, "rmtree"))  # fmt: skip
        for owner, name in places:
            patch.setattr(owner, name, self._deadly(getattr(owner, name), name))

    def _deadly(self, function, name):
        def call(*arguments, **options):
            self.count += 1
            if self.count == self._at:
                if name == "write":
                    descriptor, tensor, offset = arguments
                    function(descriptor, tensor.reshape(-1)[: tensor.numel() // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call


def in_a_child(body):
    """What `body` returns, a number of 0..255, or None where it was killed."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(body())
        finally:
            os._exit(255)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else None


def killed_at(point, task):
    with pytest.MonkeyPatch.context() as patch:
        Deaths(patch, point)
        return conversion.run(task)


def assert_no_transformer_but_whole(folder, expected):
    try:
        shards = find_transformer(str(folder)).shards
    except ValueError:
        return
    for shard in shards:
        assert shard.read_bytes() == expected[str(shard.relative_to(folder))], shard


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def in_small_steps(monkeypatch):
    monkeypatch.setattr(writers, "WRITE_BYTES", 2**18)
    monkeypatch.setattr(transfer, "SYNC", 2**20)


@pytest.mark.parametrize("to", MODEL_FORMATS)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, checkpoints, tensors, to, in_small_steps, capfd):
    seed = random.randrange(2**32)
    print(f"\nseed {seed}")
    source = checkpoints()
    if to == "mindspeed":
        source = formats.original_folder(tmp_path / "source", tensors)
    with pytest.MonkeyPatch.context() as patch:
        touches = Deaths(patch)
        expected = contents(convert(source, tmp_path / "undisturbed", to, dtype="bf16"))
    assert touches.count > 50
    task = arguments(source, tmp_path / "made", to, dtype="bf16")
    last = range(touches.count - 2, touches.count + 1)  # around the moment in which the target gets its name
    points = [1, *random.Random(seed).sample(range(2, touches.count - 4), 2), *last]
    for point in points:
        assert in_a_child(lambda: killed_at(point, task)) is None, f"touch {point} of {touches.count} was none"
        if point < touches.count - 2:
            assert not (tmp_path / "made").exists()
            with pytest.raises(ValueError):
                find_transformer(str(tmp_path / "made.partial"))
            assert_no_transformer_but_whole(tmp_path / "made.partial" / "made", expected)
        assert conversion.run(task) == 0
        assert contents(tmp_path / "made") == expected, f"killed at touch {point} of {touches.count}"
        shutil.rmtree(tmp_path / "made")
    assert not (tmp_path / "made.partial").exists()


def test_it_goes_on_where_it_was(tmp_path, tensors, in_small_steps, monkeypatch, capsys):
    save_file(tensors, tmp_path / "wan")
    task = arguments(tmp_path / "wan", tmp_path / "made", "mindspeed")
    begun, whole = [], transfer.read_as

    def counted(*what, **how):
        begun.append(what[1:])  # key and part
        if len(begun) == 40:
            raise KeyboardInterrupt
        return whole(*what, **how)

    monkeypatch.setattr(transfer, "read_as", counted)
    assert conversion.run(task) == 130
    told = "interrupted; what was written is kept, and the same command continues from there\n"
    assert capsys.readouterr().err == f"2 files to write, 0.02 GB of weights\n{told}", "no bar but on a terminal"
    recorded = int((tmp_path / "made.partial" / "journal").read_bytes().split(b"\n")[-2])
    assert 20 < recorded < 40
    assert conversion.run(task) == 0
    total = sum(len(list(writers.pieces(tensor))) for tensor in tensors.values())
    assert len(begun) == 40 + total - recorded, "nothing that was recorded is done again"
    assert begun[40] == begun[recorded]
    assert_same(torch.load(tmp_path / "made" / RELEASE)["model"], formats.mindspeed_names(tensors))


def test_memory_is_that_of_a_piece(tmp_path, monkeypatch):
    """Of a network of 100 MB, in pieces of 1 MB."""
    source = random_wan.heavy_transformer(tmp_path / "source")
    monkeypatch.setattr(writers, "WRITE_BYTES", 2**20)

    def grown(to):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = conversion.run(arguments(source / "transformer", tmp_path / to, to, dtype="bf16"))
        return 254 if status else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024

    grew = in_a_child(lambda: grown("diffusers"))
    print(f"\n{grew} MiB")
    assert grew < 40
    assert (tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors").stat().st_size > 40e6


# Refused


@pytest.fixture
def refused(capsys):
    def run(*given, **options):
        assert conversion.run(arguments(*given, **options)) == 1
        return capsys.readouterr().err

    return run


def test_refusals_of_targets(tmp_path, tensors, refused, monkeypatch):
    source, target = tmp_path / "wan", tmp_path / "made"
    save_file(tensors, source)
    target.mkdir()
    assert "made exists. Give another target" in refused(source, target, "diffusers")
    target.rmdir()
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "own").touch()
    assert "is in the way" in refused(source, target, "diffusers")
    shutil.rmtree(tmp_path / "made.partial")
    usage = shutil.disk_usage(tmp_path)
    for to in MODEL_FORMATS:  # nothing was written: another choice is no other than that which was begun
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
            assert "needs 0.02 GB more, but 0.00 GB are free" in refused(source, target, to)
        assert not (tmp_path / "made.partial").exists()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "read_as", interrupted)
        assert conversion.run(arguments(source, target, "diffusers")) == 130
    assert "--to was diffusers, is mindspeed" in refused(source, target, "mindspeed")
    assert "--dtype was keep, is fp32" in refused(source, target, "diffusers", dtype="fp32")
    os.utime(source, (1, 1))
    assert "what SOURCE holds changed. To resume" in refused(source, target, "diffusers")
    shutil.rmtree(tmp_path / "made.partial")
    with unfinished.unfinished(target, {}):
        assert "Another process is writing" in refused(source, target, "diffusers")


def test_a_target_is_refused_before_anything_is_written(tmp_path, tensors, refused, checkpoints, monkeypatch):
    source, target = tmp_path / "wan", tmp_path / "link"
    save_file(tensors, source)
    monkeypatch.setattr(transfer, "lay_out", None)
    monkeypatch.chdir(tmp_path)
    target.symlink_to(tmp_path / "nothing")
    assert "link is a link to " in refused(source, target, "diffusers")
    for there in ("/", "..", ""):
        assert "exists. Give another target" in refused(source, there, "diffusers")
    for nowhere in (source / "below_a_file", tmp_path / ("x" * 250)):
        told = refused(source, nowhere, "diffusers")
        assert "Errno" in told and "nothing was written" in told and "kept" not in told
    folder = shutil.copytree(checkpoints(), tmp_path / "folder")
    for inner in ("tokenizer/made", "scheduler/a/made"):
        assert "which is read completely. Give a target outside" in refused(folder, folder / inner, "diffusers")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("written", ["folders", "empty files"])
def test_what_was_begun_without_a_weight_is_begun_anew(tmp_path, tensors, written, in_small_steps):
    """Also as something else: nothing of it is of use."""
    save_file(tensors, tmp_path / "wan")

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            Deaths(patch, 1 if written == "folders" else 2)
            return conversion.run(arguments(tmp_path / "wan", tmp_path / "made", "diffusers", shard_size="2MB"))

    assert in_a_child(killed) is None
    assert (tmp_path / "made.partial" / "made").is_dir()
    made = convert(tmp_path / "wan", tmp_path / "made", "mindspeed", dtype="bf16")
    assert set(contents(made)) == {str(RELEASE), "latest_checkpointed_iteration.txt"}


def test_refusals_of_sources(tmp_path, tensors, refused):
    target = tmp_path / "made"

    def told(tensors, to="diffusers", **options):
        save_file(tensors, tmp_path / "source.safetensors")
        shutil.rmtree(tmp_path / "made.partial", ignore_errors=True)
        message = refused(tmp_path / "source.safetensors", target, to, **options)
        assert not target.exists()
        return message

    assert "does not exist" in refused(tmp_path / "none", target, "diffusers")
    assert "Wan transformer, UMT5 text encoder, Wan VAE" in told({"x": torch.zeros(2)})
    bias = "blocks.1.self_attn.q.bias"
    assert "1 missing: blocks.1.attn1.to_q.bias" in told({k: x for k, x in tensors.items() if k != bias})
    assert not (tmp_path / "made.partial").exists()
    broken = tensors | {bias: torch.full((256,), float("nan"))}
    assert "NaN or infinite values in blocks.1.attn1.to_q.bias" in told(broken)
    large = tensors | {bias: torch.full((256,), 1e6)}
    assert "up to 1e+06 in blocks.1.attn1.to_q.bias, which exceed torch.float16" in told(large, dtype="fp16")
    for size in ("much", "0"):
        said = told(tensors, shard_size=size)
        assert f"--shard-size {size}: " in said and "Give a number and a unit, such as 5GB" in said
    narrow = tiny_models.wan_transformer()
    narrow.save_pretrained(tmp_path / "narrow")
    assert "has attention_head_dim 24" in refused(tmp_path / "narrow", target, "mindspeed")
    vae = tiny_models.wan_vae()
    vae.save_pretrained(tmp_path / "vae")
    assert "vae: MindSpeed-MM's layout has only transformers; use --to diffusers" in refused(
        tmp_path / "vae", target, "mindspeed")  # fmt: skip


def test_a_part_that_is_not_whole_is_not_left_out(tmp_path, checkpoints, refused, capsys):
    source = shutil.copytree(checkpoints(experts=1), tmp_path / "source")
    shutil.rmtree(source / "vae")
    folder = convert(source, tmp_path / "made", "diffusers")
    assert "omitted: vae" in capsys.readouterr().out and not (folder / "vae").exists()
    (source / "vae").mkdir()
    assert "vae: " in refused(source, tmp_path / "other", "diffusers")
    said = refused(source, tmp_path / "other", "mindspeed")
    assert "has attention_head_dim 24" in said, "for which the VAE is nothing"
    index = json.loads((source / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (source / "model_index.json").write_text(json.dumps(index))
    assert "has no transformer_2/config.json" in refused(source, tmp_path / "other", "mindspeed")
