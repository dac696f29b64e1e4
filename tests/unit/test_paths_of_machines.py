"""Specs and messages with the paths that another machine has, and the folders that can be mapped."""

import os
from pathlib import PurePosixPath

import pytest
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, ProfileSpec, SampleSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.specs import Cluster, Spec, VisionSpec
from ascend_runtime.specs.paths import PATHS, with_paths, without_paths
from ascend_runtime.wire import messages
from ascend_runtime.wire.plans import PlannedJob

NAMES = ("a", "models", "C:", "D:\\wan", "wan 2.2", "视频", "..hidden", "x.safetensors", "é", "_")


def there(path, folders):
    return with_paths(VaeSpec(path=path), folders).path


@pytest.mark.parametrize("path, folders, wanted", [
    ("/data/models/vae", {"/data/models": "/mnt/models"}, "/mnt/models/vae"),
    ("/data/models", {"/data/models": "/mnt/models"}, "/mnt/models"),
    ("/data/models", {"/data/models/": "/mnt/models/"}, "/mnt/models"),
    ("/data/models2/vae", {"/data/models": "/mnt/models"}, "/data/models2/vae"),
    ("/data/vae", {}, "/data/vae"),
    ("/data/models/wan/vae", {"/data": "/a", "/data/models/wan": "/c", "/data/models": "/b"}, "/c/vae"),
    ("/data/models/other/vae", {"/data": "/a", "/data/models/wan": "/c", "/data/models": "/b"}, "/b/other/vae"),
    ("/data/vae", {"/": "/mnt"}, "/mnt/data/vae"),
    ("/mnt/data/vae", {"/mnt": "/"}, "/data/vae"),
    ("//data/vae", {"/data": "/mnt"}, "/mnt/vae"),
    ("/data/a", {"/data": "/data/a"}, "/data/a/a"),  # once, not again
    ("/data/../other/vae", {"/data": "/mnt"}, "/other/vae"),  # a spec has no ..
    ("/data/C:\\models\\vae", {"/data": "/mnt"}, "/mnt/C:\\models\\vae"),  # a name, in which \ separates nothing
])  # fmt: skip
def test_the_innermost_folder_counts_and_a_path_in_none_stays(path, folders, wanted):
    assert there(path, folders) == wanted


def test_links_are_other_folders_than_those_they_lead_to(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    assert there(tmp_path / "link" / "vae", {str(tmp_path / "models"): "/mnt"}) == str(tmp_path / "link" / "vae")
    assert there(tmp_path / "link" / "vae", {str(tmp_path / "link"): "/mnt"}) == "/mnt/vae"


def test_random_folders_are_mapped_as_a_plain_search_maps_them(rng):
    for _ in range(300):
        folders = {random_path(rng, 3): random_path(rng, 3) for _ in range(rng.randrange(6))}
        written = {f"{here}/" if rng.random() < 0.3 else here: f"{to}/" if rng.random() < 0.3 else to
                   for here, to in folders.items()}  # fmt: skip
        path = PurePosixPath(random_path(rng, 5))
        around = [here for here in folders if path.is_relative_to(here)]
        inner = max(around, key=len, default=None)
        wanted = path if inner is None else PurePosixPath(folders[inner]) / path.relative_to(inner)
        assert there(str(path), written) == str(wanted), (path, written)


def random_path(rng, depth):
    return "/" + "/".join(rng.choice(NAMES) for _ in range(rng.randint(1, depth)))


def test_all_paths_of_a_message_are_mapped_and_nothing_else_changes():
    folders = {"/m": "/n"}
    model = DiffusionModelSpec(path="/m/a", low_noise_path="/m/b", boundary=0.9,
                               loras=(LoraSpec(path="/m/l", strength=0.5), LoraSpec(path="/o/l")))  # fmt: skip
    encoder = TextEncoderSpec(path="/m/t", path_2="/m/u", vision_path="/m/v", tokenizer_path="/m/w",
                              tokenizer_path_2="/m/x")  # fmt: skip
    vae = VaeSpec(path="/m/vae")
    latent = torch.zeros(1, 16, 2, 4, 6)
    sample = messages.Sample(
        job=1, model=model, parallel=ParallelSpec(), spec=SampleSpec(), latent=latent,
        positive=messages.Conditioning(text=latent), profile=ProfileSpec(folder="/m/p"),
    )  # fmt: skip
    setting = messages.CallSetting(model=model, parallel=ParallelSpec(),
                                   run=messages.SamplerRun(number=1, sigmas=(1.0, 0.0)))  # fmt: skip
    for message in (
        sample, messages.Load(job=1, model=model, encoder=encoder, vae=vae),
        messages.Encode(job=1, encoder=encoder, text="/m/a"),
        messages.Velocity(job=1, setting=setting, step=0, latents=[latent], passes=[]),
        messages.Describe(job=1, vae=vae, model=model, network=model, encoder=encoder),
        messages.Choose(job=1, planned=PlannedJob(model=model, encoder=encoder, vae=vae)),
    ):  # fmt: skip
        text = repr(message)
        mapped = with_paths(message, folders)
        assert repr(mapped) == text.replace("'/m/", "'/n/").replace("text='/n/a'", "text='/m/a'")
        assert repr(message) == text and type(mapped) is type(message)
    assert with_paths(sample, folders).latent is latent
    assert with_paths(sample, {"/other": "/n"}) is sample and with_paths(sample, {}) is sample
    ping = messages.Ping(job=1)
    assert with_paths(ping, folders) is ping


def test_names_that_a_machine_has_otherwise_are_not_judged_again():
    """A client has refused experts that are swapped; ranks must not each decide it by their own folders' names."""
    spec = DiffusionModelSpec(path="/models/one", low_noise_path="/models/two")
    mapped = with_paths(spec, {"/models/one": "/m/low_noise", "/models/two": "/m/high_noise"})
    assert (mapped.path, mapped.low_noise_path) == ("/m/low_noise", "/m/high_noise")


def test_specs_that_differ_in_paths_only_are_equal_without_them():
    one, other = (DiffusionModelSpec(path=f"/{name}/wan", loras=(LoraSpec(path=f"/{name}/l"),)) for name in "ab")
    assert one != other and without_paths(one) == without_paths(other)
    assert without_paths(one) != without_paths(DiffusionModelSpec(path="/a/wan", boundary=0.5, loras=one.loras))


def test_every_path_of_a_spec_is_known():
    specs = [spec for spec in Spec.__subclasses__() if spec is not Cluster and spec.__module__.startswith("ascend")]
    assert len(specs) > 10 and VisionSpec in specs
    for spec in specs:
        paths = [name for name in spec.__struct_fields__ if "path" in name or "folder" in name or "file" in name]
        assert tuple(paths) == PATHS.get(spec, ()), spec


@pytest.mark.parametrize("here, to", [
    ("models", "/m"), ("~/models", "/m"), ("C:\\models", "/m"), ("", "/m"), ("/a/../b", "/m"), ("/a", "/m/.."),
    ("/a", "m"), ("/a\0", "/m"), (f"/{'a' * 4096}", "/m"), ("/\udcff", "/m"), ("/a", "/\udcff"),
])  # fmt: skip
def test_folders_that_cannot_be_mapped_are_refused_where_the_cluster_is_described(here, to):
    with pytest.raises(ValueError, match="paths of atlas2 is "):
        cluster({here: to})


def test_a_folder_that_is_written_in_two_ways_is_refused():
    with pytest.raises(ValueError, match="'/a', '/a/'"):
        cluster({"/a": "/b", "/a/": "/c"})
    assert cluster({"/a/": "/b", "/a/b": os.sep}).paths == {"atlas2": {"/a": "/b", "/a/b": "/"}}


def cluster(folders):
    return Cluster(name="pair", listen="10.0.0.1:29600", key="/key", ranks=2, paths={"atlas2": folders})
