"""Machines whose files differ: which, on which machines, and what to do, before anything is loaded."""

import json
import os
import shutil
from pathlib import Path

import gloo_ranks
import msgspec
import pytest
import torch
from ascend_runtime import LoraSpec
from ascend_runtime.engine.same_files.differences import MAX_DIFFERENCES, difference
from ascend_runtime.engine.same_files.listing import HeldFile, Listing, files_by_part, listing
from ascend_runtime.specs.paths import without_paths
from msgspec.structs import force_setattr
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"
LORA = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.full((2, 192), 0.01),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.full((192, 2), 0.01)}  # fmt: skip


def test_machines_with_other_files_are_refused_by_name_and_go_on_when_they_are_mended(tmp_path):
    for models in ("atlas1/models", "atlas2/disk/models"):
        for name in ("wan", "other", "sharded"):
            shutil.copytree(MODEL, tmp_path / models / name)
        in_shards(tmp_path / models / "sharded" / "transformer")
        save_file(LORA, tmp_path / models / "lora.safetensors")
    gloo_ranks.run("machines_files_rank.py", tmp_path, 3)


def in_shards(folder):
    stem = "diffusion_pytorch_model"
    whole = folder / f"{stem}.safetensors"
    tensors = list(load_file(whole).items())
    names = [f"{stem}-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file(dict(tensors[number::2]), folder / name)
    weight_map = {key: names[number % 2] for number, (key, _) in enumerate(tensors)}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole.unlink()


def held(name, size=1000, digest="one", root="/m"):
    return HeldFile(part="transformer", name=name, path=f"{root}/{name}", size=size, digest=digest)


COPY = "Copy the files of one machine to the others, or have the cluster's file map their folder to one with the same"
SHARDS = held("1-of-2"), held("2-of-2")


@pytest.mark.parametrize("listings, said", [
    ([Listing(files=SHARDS), Listing(files=(SHARDS[0], held("2-of-2", 999, root="/n")))],
     "The machines have different files. /m/2-of-2 on atlas1 has 1,000 bytes and /n/2-of-2 on atlas2 has 999 bytes "
     "(transformer). " + COPY),
    ([Listing(files=SHARDS), Listing(files=(SHARDS[0], held("2-of-2", digest="other"))), Listing(files=SHARDS)],
     "The machines have different files. The content of /m/2-of-2 on atlas1 and atlas3 and /m/2-of-2 on atlas2 "
     "differs, in 1,000 bytes each (transformer). " + COPY),
    ([Listing(files=SHARDS), Listing(files=SHARDS[:1]), Listing(files=SHARDS[:1])],
     "The machines have different files. atlas2 and atlas3 lack /m/2-of-2 on atlas1 (transformer). " + COPY),
    ([Listing(files=SHARDS[:1]), Listing(files=(held("1-of-2", 999), SHARDS[1])), Listing()],
     "/m/1-of-2 on atlas1 has 1,000 bytes and /m/1-of-2 on atlas2 has 999 bytes (transformer). atlas3 lacks /m/1-of-2 "
     "on atlas1 (transformer). atlas1 and atlas3 lack /m/2-of-2 on atlas2 (transformer). "),
    ([Listing(error="/m/wan lacks shard 2 of 2. Download the missing shards."), Listing(files=SHARDS)],
     "On atlas1: /m/wan lacks shard 2 of 2. Download the missing shards. The files on atlas2 can be used. " + COPY),
    ([Listing(files=SHARDS), Listing(files=SHARDS[::-1])],
     "The machines have the same files in another order, which goes by their names. Give files and folders the same"),
    ([Listing(files=SHARDS), Listing(files=SHARDS, distilled="LightX2V, 4 steps")],
     "By the names of its files and folders, the model is not distilled on atlas1 and LightX2V, 4 steps on atlas2, so "
     "its default settings differ. Give files and folders the same names on all machines."),
])  # fmt: skip
def test_an_error_names_files_machines_and_the_cure(listings, said):
    assert len({one.digest for one in listings}) > 1
    assert said in difference({f"atlas{number}": one for number, one in enumerate(listings, 1)})


def test_an_error_names_some_files_of_many():
    one, other = (Listing(files=tuple(held(f"file-{n}", digest=digest) for n in range(9))) for digest in ("a", "b"))
    text = difference({"atlas1": one, "atlas2": other})
    assert text.count("The content of") == MAX_DIFFERENCES and " 5 more files differ. " in text


def test_machines_that_cannot_use_a_file_are_alike():
    """Each rank says then what is wrong, as on one machine."""
    one, other = Listing(error="/m does not exist."), Listing(error="/n does not exist.")
    assert one.digest == other.digest != Listing().digest


def test_what_a_spec_names_may_have_another_name_on_each_machine(tmp_path):
    """A file that a cluster's file maps by its whole path."""
    files = [tmp_path / name for name in ("one.safetensors", "other.safetensors")]
    for file in files:
        save_file(LORA, file)
    made = [listing(spec, [], files_by_part(spec, [])) for spec in (LoraSpec(path=str(file)) for file in files)]
    assert made[0].digest == made[1].digest and made[0].files != made[1].files


def test_a_name_that_is_not_utf_8_can_be_sent(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    folder = os.fsdecode(os.fsencode(tmp_path) + b"\xff")
    os.rename(shutil.copytree(tmp_path, f"{tmp_path}-copy"), folder)
    spec = without_paths(LoraSpec(path="/m"))
    force_setattr(spec, "path", folder)
    (file,) = listing(spec, [], files_by_part(spec, [])).files
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(file), type=HeldFile) == file and "\\udcff" in file.path
