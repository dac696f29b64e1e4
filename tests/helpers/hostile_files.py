"""Files and folders of somebody who means harm, each read in a process of its own: `hostile_files.py FOLDER [NAME...]`.

What a case makes lies in FOLDER/NAME; what it would run or write lies outside of that. Prints, as JSON, what became of
each: what was said, the CPU time in seconds, how much memory was added in bytes, and what appeared outside.
"""

import argparse
import base64
import json
import math
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from importlib import import_module
from pathlib import Path

import torch
from ascend_runtime.commands import conversion, inspection
from ascend_runtime.recognition.calibration_file import read_calibration
from ascend_runtime.models.registry import BUILT_IN
from ascend_runtime.models.wan.files.lora_names import LORA_NAMES
from ascend_runtime.recognition.lora.files import read_lora
from ascend_runtime.components import Components
from ascend_runtime.specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from safetensors.torch import load_file, save_file

SOUND = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"
SPECS = {"transformer": DiffusionModelSpec, "text_encoder": TextEncoderSpec, "vae": VaeSpec}
WEIGHTS = "diffusion_pytorch_model.safetensors"
ESCAPES = "\x1b]0;title\x07\x1b[31mred\u202e\nline"
SECONDS = 30  # of CPU time, after which a case is ended: far beyond what it may take
CASES = {}  # by name: (how it is read, what makes it in a folder and returns the path to read)


def case(how):
    def add(make):
        CASES[make.__name__] = (how, make)
        return make

    return add


def cases(how, name, made, **kinds):
    """One of each kind: made(folder, what the kind is)."""
    for kind, given in kinds.items():
        CASES[f"{name}_{kind}"] = (how, lambda folder, given=given: made(folder, given))


def now(given):
    """What is large is made when it is wanted."""
    return given() if callable(given) else given


# How they are read


def inspected(path):
    return inspection.run(argparse.Namespace(path=str(path)))


def converted(path):
    target = Path(path).parent / "target"
    return conversion.run(argparse.Namespace(source=str(path), target=str(target), to="diffusers", dtype="keep",
                                             shard_size="5GB"))  # fmt: skip


def loaded(kind):
    def load(path):
        return refusal(lambda: Components(torch.device("cpu")).get(SPECS[kind](path=str(path)), lambda *_: None))

    return load


def lora(path):
    return refusal(lambda: read_lora(path, {"blocks.0.attn1.to_q.weight": (64, 64)}, LORA_NAMES))


def calibration(path):
    return refusal(lambda: read_calibration(str(path)))


def refusal(read):
    """0 where it can be read; 1 where not, which is said."""
    try:
        read()
    except ValueError as error:
        print(error)
        return 1
    return 0


# What they are made of


def model(folder):
    return Path(shutil.copytree(SOUND, folder / "model"))


def edited(folder, part, **changes):
    made = model(folder)
    file = made / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return made / part


def with_content(folder, given):
    """given: (a file of the model, its content)."""
    made, content = model(folder), now(given[1])
    file = made / given[0]
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return made if file.parent.name == "tokenizer" or "/" not in given[0] else file.parent


def with_link(folder, given):
    """given: (a path of the model, where the link in its place leads: within the case's folder, or anywhere)."""
    made = model(folder)
    (folder / "secret").mkdir()
    (folder / "secret" / "key").write_text("the user's key")
    (folder / "secret" / "key.json").write_text("{}")
    place = made / given[0]
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(given[1] if given[1].startswith("/") else folder / given[1])
    return made


def with_pipe(folder, name):
    made = model(folder)
    (made / name).unlink(missing_ok=True)
    os.mkfifo(made / name)
    return made


def safetensors(header, data=b"", name="file.safetensors"):
    def make(folder):
        content = now(header)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        content += b" " * (-len(content) % 8)
        (folder / name).write_bytes(struct.pack("<Q", len(content)) + content + data)
        return folder / name

    return make


def sparse(shapes, name="file.safetensors", dtypes=()):
    """Zeros that take no place on disk, of these shapes by name; in fp32, or as `dtypes` says by name."""

    def make(folder):
        header, end = {}, 0
        for key, shape in shapes.items():
            dtype = dict(dtypes).get(key, "F32")
            start, end = end, end + math.prod(shape) * int(dtype[1:]) // 8
            header[key] = entry(shape, start, end, dtype)
        file = safetensors(header, name=name)(folder)
        os.truncate(file, file.stat().st_size + end)
        return file

    return make


def entry(shape, start=0, end=0, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def torch_file(content, name="file.pth", members=(), **options):
    """A zip as torch.save writes it, around a pickle."""

    def make(folder):
        with zipfile.ZipFile(folder / name, "w", **options) as archive:
            for member, held in (("data.pkl", now(content)), ("version", b"3\n"), *now(members)):
                archive.writestr(f"archive/{member}", held)
        return folder / name

    return make


def saved(content, name="file.pth"):
    def make(folder):
        torch.save(now(content), folder / name)
        return folder / name

    return make


def distributed(content):
    def make(folder):
        (folder / "iter_0000001").mkdir()
        (folder / "latest_checkpointed_iteration.txt").write_text("1")
        (folder / "iter_0000001" / ".metadata").write_bytes(now(content))
        return folder

    return make


class Runs:
    def __reduce__(self):
        return os.system, ("touch ../ran",)


PTH, DCP = b"\x80\x02", b"\x80\x04"
LAST = b"."


def text(words):
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def nested(count, levels):
    """Dicts in dicts: each holds the one before it as often as `count` says."""
    content = {"w": torch.zeros(1)}
    for _ in range(levels):
        content = {f"{number}": content for number in range(count)}
    return content


# Configs


for number, (part, changes) in enumerate([
    ("transformer", {"num_layers": 10**5}), ("transformer", {"num_layers": 10**9}),
    ("transformer", {"num_attention_heads": 10**9}), ("transformer", {"rope_max_seq_len": 10**9}),
    ("transformer", {"attention_head_dim": 10**8}), ("transformer", {"ffn_dim": 10**30}),
    ("transformer", {"patch_size": [10**6] * 3}), ("transformer", {"patch_size": [1] * 10**5}),
    ("transformer", {"_class_name": ESCAPES}),
    ("transformer", {"_class_name": ["x"]}), ("transformer", {"_class_name": {}}),
    ("text_encoder", {"num_layers": 10**9}), ("text_encoder", {"vocab_size": 10**12}),
    ("text_encoder", {"num_heads": 10**7}), ("text_encoder", {"feed_forward_proj": ESCAPES}),
    ("vae", {"num_res_blocks": 10**9}), ("vae", {"base_dim": 10**15}), ("vae", {"dim_mult": [10**9] * 4}),
    ("vae", {"dim_mult": [1] * 2000, "temperal_downsample": [False] * 1999}), ("vae", {"z_dim": 10**7}),
    ("transformer", {"eps": 0}), ("transformer", {"eps": -1e-6}), ("transformer", {"rope_max_seq_len": 0}),
    ("transformer", {"eps": math.inf}), ("text_encoder", {"layer_norm_epsilon": -1.0}), ("vae", {"patch_size": -1}),
    ("vae", {"patch_size": 0.5}), ("vae", {"latents_std": [0.0] * 16}), ("vae", {"latents_mean": [math.nan] * 16}),
    ("vae", {"scale_factor_spatial": 4}), ("vae", {"scale_factor_temporal": 8}),
    ("vae", {"scale_factor_spatial": 10**9}), ("vae", {"attn_scales": [1.0] * 10**6}),
]):  # fmt: skip
    cases(inspected, "config", lambda folder, given: edited(folder, given[0], **given[1]),
          **{f"{number}_{part}_{'_'.join(changes)}": (part, changes)})  # fmt: skip

cases(inspected, "json", with_content,
      deep=("transformer/config.json", lambda: '{"a":' * 100_000 + "1" + "}" * 100_000),
      long_number=("transformer/config.json", lambda: '{"num_layers":' + "9" * 2_000_000 + "}"),
      many_lists=("vae/config.json", lambda: "[" + "[]," * 2_500_000 + "1]"),
      large=("vae/config.json", lambda: '{"a":"' + "a" * 20_000_000 + '"}'),
      utf_16=("vae/config.json", "\ufeff{}".encode("utf-16")[:-1]),
      half_a_character=("vae/config.json", '{"_class_name": "\\ud800\\u001b[31m"}'),
      index_deep=("model_index.json", '{"transformer_2":' + "[" * 100_000 + "]" * 100_000 + "}"),
      weight_map_deep=(f"transformer/{WEIGHTS}.index.json", '{"weight_map":{"a":' + "[" * 50_000 + "]" * 50_000 + "}}"),
      of_infinity=("transformer/config.json", '{"eps": 1e999}'),
      boundary=("model_index.json", json.dumps({"boundary_ratio": ESCAPES})))  # fmt: skip
cases(loaded("transformer"), "load_json", lambda folder, given: with_content(folder, given).parent,
      of_no_deviation=("vae/config.json", json.dumps({"latents_mean": [0.0] * 16, "latents_std": [0.0] * 16})),
      rgb_of_one_row=("vae/latent_rgb.json", json.dumps({"factors": [[0.0] * 16] * 3})),
      rgb_of_a_number=("vae/latent_rgb.json", json.dumps({"factors": [1.0] * 16})),
      rgb_of_a_bias=("vae/latent_rgb.json", json.dumps({"bias": [0.0] * 5})))  # fmt: skip
cases(inspected, "link", with_link, config_to_zeros=("transformer/config.json", "/dev/zero"),
      config_of_proc=("vae/config.json", "/proc/self/cmdline"),
      weights_to_zeros=(f"transformer/{WEIGHTS}", "/dev/zero"),
      weights_to_words=(f"vae/{WEIGHTS}", "secret/key"))  # fmt: skip
cases(inspected, "pipe", with_pipe, config="transformer/config.json", weights=f"transformer/{WEIGHTS}",
      tokenizer="tokenizer/tokenizer.json")  # fmt: skip


# What leads out of the folder


@case(converted)
def index_to_a_folder_above(folder):
    made = model(folder)
    moved = Path(shutil.move(made, folder / "repository" / "x" / "y" / "model"))
    (folder / "repository" / "custom_nodes").mkdir()
    (folder / "repository" / "custom_nodes" / "payload.py").write_text("print('run')")
    add_to_index(moved, "../../../custom_nodes")
    return moved


@case(converted)
def index_through_a_link(folder):
    made = model(folder)
    (made / "p" / "q" / "r").mkdir(parents=True)
    (made / "deep").symlink_to("p/q/r")
    (made / "nodes").mkdir()
    (made / "nodes" / "payload.py").write_text("print('run')")
    add_to_index(made, "deep/../../../nodes")
    return made


def add_to_index(made, key):
    index = json.loads((made / "model_index.json").read_text())
    (made / "model_index.json").write_text(json.dumps({**index, key: ["diffusers", "X"]}))
    return made


cases(converted, "index_key", lambda folder, key: add_to_index(model(folder), key), above="..", absolute="/tmp",
      escapes=ESCAPES, nothing="", zero="a\0b")  # fmt: skip
cases(converted, "copy_of", with_link, a_key=("tokenizer/vocab.txt", "secret/key"),
      a_json=("vae/more.json", "secret/key.json"), a_folder=("scheduler", "secret"),
      a_folder_in_one=("tokenizer/more", "secret"),
      the_tokenizer=("tokenizer", "secret"), zeros=("tokenizer/vocab.txt", "/dev/zero"),
      nothing=("tokenizer/vocab.txt", "gone"), the_index=("model_index.json", "secret/key.json"))  # fmt: skip


@case(converted)
def link_to_itself(folder):
    made = model(folder)
    (made / "vae" / "more.json").symlink_to("more.json")
    return made


@case(converted)
def link_to_itself_as_the_target(folder):
    made = model(folder)
    (folder / "target").symlink_to("target")
    return made


@case(converted)
def folders_without_end(folder):
    made = model(folder)
    (made / "tokenizer" / "/".join(["a"] * 300)).mkdir(parents=True)
    return made


@case(converted)
def files_without_end(folder):
    made = model(folder)
    for number in range(12_000):
        (made / "tokenizer" / f"{number}.txt").touch()
    return made


@case(converted)
def target_that_leads_elsewhere(folder):
    (folder / "elsewhere").mkdir()
    (folder / "target.partial").symlink_to(folder / "elsewhere")
    return model(folder)


def weight_map(folder, name):
    made = model(folder)
    (folder / "elsewhere").mkdir()
    file = made / "transformer" / WEIGHTS
    names = load_file(file)
    file.rename(folder / "elsewhere" / WEIGHTS)
    index = {"weight_map": dict.fromkeys(names, name.replace("FOLDER", str(folder)))}
    (made / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return made / "transformer"


cases(inspected, "weight_map", weight_map, above=f"../../elsewhere/{WEIGHTS}", absolute=f"FOLDER/elsewhere/{WEIGHTS}",
      escapes=ESCAPES)  # fmt: skip


def tracker(folder, content):
    (folder / "wan").mkdir()
    shutil.copytree(SOUND / "transformer", folder / "elsewhere")
    (folder / "wan" / "latest_checkpointed_iteration.txt").write_text(content)
    return folder / "wan"


cases(inspected, "tracker", tracker, above="../elsewhere", absolute="/tmp", digits="9" * 60, large="1" * 10**6,
      escapes=ESCAPES)  # fmt: skip


# Tokenizers


def tokenizer(folder, given):
    """given: names of files, and what they say; a tokenizer.json that is None is not there."""
    made = model(folder)
    for name, content in given.items():
        if content is None:
            (made / "tokenizer" / name).unlink()
        else:
            content = now(content)
            content = json.dumps(content) if isinstance(content, (dict, list)) else content
            (made / "tokenizer" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return made


CODE = "open('../ran', 'w').write('x')\nclass Tokenizer: pass\n"
OWN = json.loads((SOUND / "tokenizer" / "tokenizer.json").read_text())


def of_pieces(pieces):
    return {**OWN, "model": {**OWN["model"], "vocab": pieces}}


for how in (inspected, converted):
    cases(how, f"tokenizer_{how.__name__}", tokenizer,
          with_code={"own.py": CODE, "tokenizer_config.json": {
              "tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}},
          with_a_config_of_code={"own.py": CODE, "tokenizer_config.json": {},
                                 "config.json": {"model_type": "none", "auto_map": {"AutoConfig": "own.Tokenizer"}}},
          of_another_class={"tokenizer_config.json": {"tokenizer_class": "RagTokenizer"}},
          of_a_class_with_escapes={"tokenizer_config.json": {"tokenizer_class": ESCAPES}})  # fmt: skip
def spiece(table):
    """The beginning of a sentencepiece model: one piece, and a table of characters."""
    def field(number, content):
        length, digits = len(content), []
        while length > 127:
            digits, length = [*digits, length & 127 | 128], length >> 7
        return bytes([number << 3 | 2, *digits, length]) + content

    return field(1, field(1, b"a")) + field(3, field(1, b"own") + field(2, table))


cases(inspected, "tokenizer", tokenizer,
      of_spiece_that_makes_much={"tokenizer.json": None, "spiece.model": lambda: spiece(bytes(4) + b"a" * 3_000_000)},
      deep={"tokenizer.json": "[" * 200_000 + "]" * 200_000},
      of_pairs={"tokenizer.json": {**OWN, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}},
      of_many_pieces={"tokenizer.json": lambda: of_pieces([[f"{number:x}", 0.0] for number in range(450_000)])},
      of_long_pieces={"tokenizer.json": lambda: of_pieces([*OWN["model"]["vocab"], ["a" * 5_000_000, 0.0]])},
      of_damaged_characters={"tokenizer.json": {
          **OWN, "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 40).decode()},
      }},
      that_makes_much={"tokenizer.json": {**OWN, "normalizer": {"type": "Sequence", "normalizers": [
          {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20}] * 6}}},
      that_makes_much_in_small_steps={"tokenizer.json": {**OWN, "normalizer": {"type": "Sequence", "normalizers": [
          {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}] * 14}}},
      that_prepends_20_mb={"tokenizer.json": lambda: {
          **OWN, "normalizer": {"type": "Prepend", "prepend": "a" * 20_000_000}}},
      that_backtracks={"tokenizer.json": {**OWN, "normalizer": {
          "type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}},
      of_many_steps={"tokenizer.json": lambda: {**OWN, "pre_tokenizer": {
          "type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}] * 100_000}}},
      of_a_large_template={"tokenizer.json": lambda: {**OWN, "post_processor": {
          **OWN["post_processor"], "special_tokens": {"</s>": {
              "id": "</s>", "ids": [1] * 10**6, "tokens": ["</s>"] * 10**6}}}}},
      of_many_added={"tokenizer.json": lambda: {**OWN, "added_tokens": [
          {**OWN["added_tokens"][0], "content": f"a{number}"} for number in range(60_000)]}},
      of_characters_that_are_long={"tokenizer.json": lambda: {**OWN, "normalizer": {
          "type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(8) + b"a" * 1_000_000).decode()}}},
      of_another_size={"tokenizer.json": of_pieces([*OWN["model"]["vocab"], *([f"a{n}", -9.0] for n in range(50))])},
      of_an_end_beyond={"tokenizer.json": {**OWN, "post_processor": {
          **OWN["post_processor"], "special_tokens": {"</s>": {"id": "</s>", "ids": [60], "tokens": ["</s>"]}}}}},
      of_a_large_number={"tokenizer.json": {**OWN, "model": {**OWN["model"], "unk_id": 10**30}}},
      of_junk={"tokenizer.json": None, "spiece.model": bytes(range(256)) * 20},
      of_much_junk={"tokenizer.json": None, "spiece.model": lambda: b"\x0a\x05\x0a\x01a\x15" * 4_000_000},
      of_nothing={"tokenizer.json": None})  # fmt: skip


# Files of torch.save


cases(inspected, "pth", lambda folder, make: make(folder),
      runs=saved({"a": Runs(), "w": torch.zeros(2)}),
      evaluates=torch_file(PTH + b"cbuiltins\neval\n" + text("open('../ran', 'w')") + b"\x85R" + LAST),
      laughs=saved(lambda: nested(2, 40)),
      holds_itself=torch_file(PTH + b"}q\x00" + text("a") + b"h\x00s" + LAST),
      deflated=torch_file(lambda: PTH + text("a" * 10**8) + LAST, compression=zipfile.ZIP_DEFLATED, compresslevel=1),
      lists=torch_file(lambda: PTH + b"(" + b"]" * 6_000_000 + b"l" + LAST),
      deep=torch_file(lambda: PTH + b"]" * 100_000 + b"a" * 99_999 + LAST),
      deep_key=torch_file(lambda: PTH + b"})" + b"\x85" * 1_000_000 + b"Ns" + LAST),
      keys_of_one_hash=torch_file(lambda: PTH + b"}(" + b"".join(
          b"\x8a\x0c" + ((2**61 - 1) * number).to_bytes(12, "little") + b"N" for number in range(60_000)
      ) + b"u" + LAST),
      memo=torch_file(PTH + b"]r" + struct.pack("<I", 2**29) + LAST),
      steps=torch_file(lambda: PTH + b"N0" * 6_000_000 + LAST),
      calls=torch_file(lambda: PTH + b"NNR" * 4_000_000 + LAST),
      pickle_of_much=torch_file(lambda: PTH + b"N" + b"0N" * 35_000_000 + LAST),
      repeats=saved(lambda: {"patch_embedding.weight": torch.zeros(1).expand(512_000, 16, 1, 2, 2)}),
      beyond=torch_file(PTH + b"}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
                        + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQK\x00K\x05\x85K\x01\x85"
                        + b"\x89NtRs" + LAST, members=(("data/0", b"\0" * 8),)),
      names=saved({f"{ESCAPES}{number}": torch.zeros(1) for number in range(3)}),
      many_names=saved(lambda: dict.fromkeys(map(str, range(30_000)), torch.zeros(1))),
      directory=torch_file(PTH + b"}" + LAST,
                           members=lambda: [(f"data/{number:0200}", b"") for number in range(40_000)]),
      other_bytes=torch_file(PTH + b"}" + LAST, members=(("byteorder", b"big"),)),
      member_above=torch_file(PTH + b"}" + LAST, members=(("../../../ran", b"x"),)))  # fmt: skip


# Distributed checkpoints


def metadata(change=lambda meta: None):
    """A checkpoint's, of one tensor; written by torch, changed before it is pickled."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint import metadata as of

    def make():
        chunk = of.ChunkStorageMetadata(torch.Size([2]), torch.Size([2]))
        chunk.offsets = torch.Size([0])
        held = of.TensorStorageMetadata(of.TensorProperties(torch.float32), torch.Size([2]), [chunk])
        place = _StorageInfo("__0_0.distcp", 0, 0)
        meta = of.Metadata({"w": held}, None, {of.MetadataIndex("w", torch.Size([0])): place})
        change(meta)
        return pickle.dumps(meta)

    return make


def all_chunks_in_each(meta):
    meta.state_dict_metadata["w"].chunks *= 2000
    meta.state_dict_metadata.update(dict.fromkeys(map(str, range(2000)), meta.state_dict_metadata["w"]))
    place, = meta.storage_data.values()
    meta.storage_data.update({type(index)(name, index.offset): place for index in [*meta.storage_data]
                              for name in meta.state_dict_metadata})  # fmt: skip


def with_place(**changes):
    def change(meta):
        (index,) = meta.storage_data
        meta.storage_data[index] = type(meta.storage_data[index])(
            **{"relative_path": "__0_0.distcp", "offset": 0, "length": 0, **changes}
        )

    return change


def long_shape(meta):
    (index,) = meta.storage_data
    meta.storage_data = {type(index)(str(number), torch.Size([1]) * 10**6): 0 for number in range(2)}


cases(inspected, "dcp", lambda folder, make: make(folder),
      runs=distributed(pickle.dumps(Runs())),
      memo=distributed(PTH + b"]r" + struct.pack("<I", 2**29) + LAST),
      bytes_of_8_gb=distributed(b"\x80\x05\x96" + struct.pack("<Q", 2**33) + LAST),
      number_of_1_gb=distributed(PTH + b"\x8b" + struct.pack("<i", 2**30) + LAST),
      digits=distributed(lambda: PTH + b"L" + b"9" * 3_000_000 + b"L\n" + LAST),
      nothing=distributed(pickle.dumps({})),
      attribute=distributed(PTH + b"ctorch\nSize\nN}" + text("__len__") + b"K\x01s\x86b" + LAST),
      lists=distributed(lambda: PTH + b"]" * 6_000_000 + LAST),
      names=distributed(lambda: PTH + b"ca\nb\n" * 5_000_000 + LAST),
      strings=distributed(lambda: PTH + b"\x8c\x02ab" * 6_000_000 + LAST),
      path_above=distributed(metadata(with_place(relative_path="../../ran"))),
      path_absolute=distributed(metadata(with_place(relative_path="/etc/passwd"))),
      path_with_escapes=distributed(metadata(with_place(relative_path=ESCAPES))),
      offset=distributed(metadata(with_place(offset=-5))),
      chunks=distributed(metadata(all_chunks_in_each)),
      long_shape=distributed(metadata(long_shape)))  # fmt: skip


# .safetensors


cases(inspected, "safetensors", lambda folder, make: make(folder),
      overlaps=safetensors({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, b"\0" * 24),
      beyond=safetensors({"a": entry([2**40], 0, 2**42)}, b"\0" * 24),
      twice=safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
                        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"\0" * 16),
      overflow=safetensors({"a": entry([2**63, 2])}), below_zero=safetensors({"a": entry([-1], 0, 8)}, b"\0" * 8),
      of_90_mb=safetensors(lambda: b'{"a":' + b" " * 90_000_000 + b"1}"),
      of_190_000_tensors=safetensors(lambda: {str(number): entry([0]) for number in range(190_000)}),
      of_25_000_tensors=safetensors(lambda: {f"blocks.{number}.a": entry([0]) for number in range(25_000)}),
      of_19_000_blocks=safetensors(
          lambda: {f"blocks.{number}.self_attn.q.weight": entry([0]) for number in range(19_000)}),
      deep=safetensors(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"),
      length=lambda folder: (folder / "a.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
      and folder / "a.safetensors",
      no_numbers=safetensors({"patch_embedding.weight": entry([0, 10**18, 1, 2, 2])}),
      dims=safetensors({"patch_embedding.weight": entry([1] * 100_000, 0, 4)}, b"\0" * 4),
      names=safetensors({ESCAPES: entry([0])}), long_name=safetensors({"a" * 10**6: entry([0])}),
      half_a_character=safetensors(b'{"a\\u001b[31m":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
      dtype=safetensors({"patch_embedding.weight": entry([1], 0, 4, ESCAPES)}, b"\0" * 4))  # fmt: skip


def many_files(folder, given):
    """given: (how many links lead to a torch.save file that takes long to read, whether each is a copy)."""
    count, copied = given
    file = torch_file(lambda: PTH + b"N0" * 3_900_000 + b"N" + LAST, name="0.pth")(folder)
    for number in range(1, count):
        if copied:
            shutil.copy(file, folder / f"{number}.pth")
        else:
            (folder / f"{number}.pth").symlink_to("0.pth")
    (folder / "config.json").write_text("{}")
    return folder


cases(loaded("vae"), "folder_of_files", many_files, linked=(8, False), many=(40, True))
cases(inspected, "many", lambda folder, make: make(folder),
      networks=safetensors(lambda: {f"{'a' * 200}{n}.conv_in.encoder.conv1.weight": entry([0]) for n in range(19_000)}),
      long_names=safetensors(lambda: {f"blocks.{n}.{'self_attn.' * 23}": entry([0]) for n in range(19_000)}))


def marked(folder, given):
    """A transformer in 8 bits, with a mark of the newer kind. given: the header's, or a layer's as a tensor."""
    tensors, made, given = load_file(SOUND / "transformer" / WEIGHTS), model(folder), now(given)
    layer = {"blocks.0.attn1.to_q.comfy_quant": given} if isinstance(given, torch.Tensor) else {}
    header = None if layer else {"_quantization_metadata": given}
    save_file(tensors | layer, made / "transformer" / WEIGHTS, metadata=header)
    return made / "transformer"


cases(inspected, "mark", marked, deep='{"layers":' + "[" * 100_000 + "]" * 100_000 + "}",
      escapes=json.dumps({"layers": {ESCAPES: {"format": ESCAPES}}}), digits='{"layers":' + "9" * 10**6 + "}",
      large=lambda: torch.zeros(30_000_000, dtype=torch.uint8),
      rotation=json.dumps({"layers": {"blocks.0.attn1.to_q": {"format": "convrot_w4a4", "convrot_groupsize": 4**19}}}),
      digits_of_groups=json.dumps({"layers": {"blocks.0.attn1.to_q": {
          "format": "asym_w4a8_int8", "params": {"group_size": "9" * 10**6}}}}))  # fmt: skip


@case(inspected)
def marks_of_all_tensors(folder):
    """As many as a file can have, each of the most bytes."""
    mark = json.dumps({"format": "nvfp4", "note": "x" * 900}).encode()
    layers = {f"blocks.{n}.comfy_quant": entry([len(mark)], n * len(mark), (n + 1) * len(mark), "U8")
              for n in range(19_000)}  # fmt: skip
    return safetensors(lambda: layers, mark * 19_000)(folder)


@case(inspected)
def scales_of_half_a_gigabyte(folder):
    """And a weight of as many rows."""
    layer = "blocks.0.self_attn.q"
    return sparse({"patch_embedding.weight": [128, 16, 1, 2, 2], f"{layer}.weight": [5 * 10**8, 1],
                   f"{layer}.weight_scale": [5 * 10**8, 1]}, dtypes={f"{layer}.weight": "I8"})(folder)  # fmt: skip


def described(folder, content):
    made = model(folder) / "transformer"
    (made / "quant_model_description.json").write_text(now(content))
    return made


cases(inspected, "description", described, deep='{"a":' * 100_000 + "1" + "}" * 100_000,
      escapes=json.dumps({"blocks.0.attn1.to_q.weight": ESCAPES, f"{ESCAPES}.weight": "W8A8"}),
      many_names=lambda: json.dumps({f"{number}.weight": "W8A8" for number in range(100_000)}),
      long_name=json.dumps({f"{'a' * 10**6}.weight": "W8A8"}))  # fmt: skip


@case(inspected)
def description_of_large_offsets(folder):
    layer = "blocks.0.attn1.to_q"
    sparse({f"{layer}.weight_offset": [64, 10**7], f"{layer}.weight_scale": [5 * 10**8]},
           "quant_model_weight_w8a8_dynamic.safetensors")(folder)  # fmt: skip
    (folder / "config.json").write_bytes((SOUND / "transformer" / "config.json").read_bytes())
    (folder / "quant_model_description.json").write_text(json.dumps({f"{layer}.weight": "W8A8_DYNAMIC"}))
    return folder


def in_a_text_encoder(folder, spiece):
    tensors = load_file(SOUND / "text_encoder" / "model.safetensors")
    save_file(tensors | {"spiece_model": now(spiece)}, folder / "umt5.safetensors")
    return folder / "umt5.safetensors"


cases(loaded("text_encoder"), "spiece_tensor", in_a_text_encoder, junk=torch.full((5000,), 7, dtype=torch.uint8),
      numbers=torch.zeros(100), large=lambda: torch.zeros(40_000_000, dtype=torch.uint8))  # fmt: skip
cases(loaded("transformer"), "load", lambda folder, make: make(folder),
      layers=lambda folder: edited(folder, "transformer", num_layers=10**5),
      laughs=saved(lambda: nested(2, 40)), names=safetensors({ESCAPES: entry([0])}))  # fmt: skip
cases(loaded("vae"), "load_vae", lambda folder, make: make(folder),
      blocks=lambda folder: edited(folder, "vae", num_res_blocks=10**6),
      steps=torch_file(lambda: PTH + b"N0" * 6_000_000 + LAST))  # fmt: skip


# LoRAs and calibrations


Q = "blocks.0.attn1.to_q"
cases(lora, "lora", lambda folder, make: make(folder),
      names=safetensors({f"{Q}.{ESCAPES}": entry([0])}), laughs=saved(lambda: nested(2, 40)),
      many=safetensors(lambda: {f"{Q}.{number}.lora_A.weight": entry([0]) for number in range(25_000)}),
      large_alpha=sparse({f"{Q}.lora_A.weight": [4, 64], f"{Q}.lora_B.weight": [64, 4], f"{Q}.alpha": [10**9]}),
      large_rank=sparse({f"{Q}.lora_A.weight": [10**7, 64], f"{Q}.lora_B.weight": [64, 10**7]}),
      runs=saved({f"{Q}.lora_A.weight": Runs()}), header=safetensors(lambda: b'{"a":' + b" " * 90_000_000 + b"1}"),
      unknown=safetensors(lambda: {f"{Q}.unknown{number}": entry([0]) for number in range(19_000)}))  # fmt: skip


def calibrated(folder, content):
    made = folder / "model"
    made.mkdir()
    (made / "ascend_calibration.json").write_text(content)
    return made


ONE = {"coefficients": [1.0], "ratios": [1.0]}
cases(calibration, "calibration", calibrated, deep='{"a":' * 100_000 + "1" + "}" * 100_000,
      names=json.dumps({ESCAPES: ONE}), many=json.dumps({str(number): ONE for number in range(10_000)}),
      large=json.dumps({"high_noise": {"ratios": [1.0] * 10**6}}),
      endless='{"high_noise": {"ratios": [1e999]}}')  # fmt: skip


@case(calibration)
def calibration_of_zeros(folder):
    (folder / "ascend_calibration.json").symlink_to("/dev/zero")
    return folder


# HunyuanVideo, whose layers are fused in files


HUNYUAN = {
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": [64], "txt_in.input_embedder.weight": [64, 8],
    "double_blocks.0.img_attn_qkv.weight": [192, 64], "double_blocks.0.img_attn_q_norm.weight": [16],
    "single_blocks.0.linear1.weight": [448, 64], "single_blocks.0.linear2.weight": [64, 320],
    "img_in.proj.weight": [64, 16, 1, 2, 2], "final_layer.linear.weight": [64, 64],
    "vector_in.in_layer.weight": [64, 12],
}  # fmt: skip
cases(inspected, "hunyuan", lambda folder, changes: sparse({**HUNYUAN, **now(changes)})(folder),
      few={}, large={"vector_in.in_layer.weight": [64, 10**8]}, odd={"single_blocks.0.linear1.weight": [449, 64]},
      one_head={"double_blocks.0.img_attn_q_norm.weight": [10**9]}, no_dims={"single_blocks.0.linear2.weight": []},
      many_dims={"single_blocks.0.linear2.weight": [1] * 8}, no_head={"double_blocks.0.img_attn_q_norm.weight": [0]},
      many_blocks=lambda: {f"single_blocks.{n}.q_norm.weight": [16] for n in range(15_000)},
      dots=lambda: {f"{'img_attn_qkv.' * 19}{n}": [1] for n in range(8_000)},
      no_width={"single_blocks.0.linear2.weight": [2**60, 0]})  # fmt: skip


def original_hunyuan(folder, scales):
    """The pair of files in 8 bits. scales: makes the one with the scales, at the path given."""
    tensors = {name: torch.zeros(shape) for name, shape in HUNYUAN.items()}
    torch.save({"module": tensors}, folder / "mp_rank_00_model_states_fp8.pt")
    scales(folder / "mp_rank_00_model_states_fp8_map.pt")
    return folder


cases(inspected, "scale_map", original_hunyuan, zeros=lambda path: path.symlink_to("/dev/zero"), pipe=os.mkfifo,
      runs=lambda path: torch.save({"single_blocks.0.linear1": Runs()}, path),
      laughs=lambda path: torch.save(nested(2, 40), path), folder=lambda path: path.mkdir(),
      many=lambda path: torch.save({f"{n}": torch.ones(()) for n in range(30_000)}, path),
      large=lambda path: torch.save({"single_blocks.0.linear1": torch.zeros(1).expand(10**9)}, path))  # fmt: skip


@case(inspected)
def many_models_in_a_folder(folder):
    for number in range(2000):
        (folder / f"hunyuan-video-{number}" / "transformers").mkdir(parents=True)
    return folder


# What looks odd and is right, so that nobody is refused what he has: read, and converted.


SOUND_CASES = {}


def sound(how):
    def add(make):
        SOUND_CASES[make.__name__] = (how, make)
        return make

    return add


def in_the_cache(folder):
    """As Hugging Face's cache keeps a download: a snapshot of links to blobs."""
    cache, made = folder / "models--a--wan", model(folder)
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in made.rglob("*") if path.is_file())):
        (cache / "blobs" / f"{number}").write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(cache / "blobs" / f"{number}", link.parent))
    shutil.rmtree(made)
    return snapshot


sound(converted)(in_the_cache)
SOUND_CASES["in_the_cache_inspected"] = (inspected, in_the_cache)
SOUND_CASES["in_the_cache_loaded"] = (loaded("text_encoder"), in_the_cache)


@sound(converted)
def a_part_of_the_cache(folder):
    return in_the_cache(folder) / "vae"


@sound(converted)
def a_link_to_the_folder(folder):
    (folder / "link").symlink_to(model(folder))
    return folder / "link"


@sound(converted)
def weights_on_another_disk(folder):
    made = model(folder)
    (folder / "disk").mkdir()
    for part in ("transformer", "vae"):
        (made / part / WEIGHTS).rename(folder / "disk" / part)
        (made / part / WEIGHTS).symlink_to(folder / "disk" / part)
    return made


@sound(inspected)
def classes_that_nobody_asks_for(folder):
    return add_to_index(add_to_index(model(folder), "vae"), "transformer")


@sound(inspected)
def kernels_that_nobody_fetches(folder):
    return edited(folder, "text_encoder", attn_implementation="a/kernel", _attn_implementation="a/kernel",
                  auto_map={"AutoConfig": "own.Config"}, quantization_config={"quant_method": "own"})  # fmt: skip


# Each in a process of its own


def run(how, path, stdin):
    """In a fork of this warm process: what it said, and what it took."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as figures:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os.dup2(stdin, 0)
            _in_the_child(how, path, figures)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        figures.seek(0)
        return {"status": status, "said": out.read(), **json.loads(figures.read() or "{}")}


def _in_the_child(how, path, figures):
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    before, status, started = _resident(), 99, time.process_time()
    try:
        status = how(path)
    except BaseException:
        traceback.print_exc()
    took = time.process_time() - started
    sys.stdout.flush()
    sys.stderr.flush()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    json.dump({"seconds": took, "memory": max(0, peak - before)}, figures)
    figures.flush()
    os._exit(status)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def read(name, folder):
    """Makes a case in a folder of its own, reads it, and says what became of it. What it may write is its target."""
    how, make = {**CASES, **SOUND_CASES}[name]
    own = folder / name
    own.mkdir()
    path = make(own)
    before = everything(folder)
    os.chdir(own)  # so that `../ran` is outside of it
    with tempfile.TemporaryFile("w+") as answers:
        answers.write("y\n" * 10)
        answers.seek(0)
        said = run(how, path, answers.fileno())
    appeared = everything(folder) - before
    target = path.parent.relative_to(folder) / "target"
    made = [one for one in appeared if Path(one).is_relative_to(target)]
    said |= {"appeared": sorted(appeared), "target": sorted(made)}
    os.chdir(folder)
    shutil.rmtree(own)
    return said


def main():
    for name in BUILT_IN:  # what a process imports for a family's networks is none of a case's costs
        import_module(f"ascend_runtime.models.{name}.networks")
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    names = [name for name in sys.argv[2:] if not name.startswith("--")] or [*CASES, *SOUND_CASES]
    print(json.dumps({name: read(name, folder) for name in names}))


if __name__ == "__main__":
    main()
