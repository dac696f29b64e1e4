"""Breaks copies of sound files at random, and loads them, for a test: `broken_files.py FOLDER SEED COUNT`.

FOLDER holds sound ones: transformer*, vae*, text_encoder*, lora*, files or folders of them, and diffusers*, whole
models; those with "hunyuan" in their names are HunyuanVideo's, the others Wan's. Prints, as JSON, how many were refused
by a ValueError that names what was broken, and how many loaded; ends with an error where some did neither, or half of
one.
"""

import json
import random
import re
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from ascend_runtime.models.registry import family
from ascend_runtime.recognition.lora.files import read_lora
from ascend_runtime.recognition.mindspeed import STAGE_FILE
from ascend_runtime.components import Components
from ascend_runtime.specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SPECS = {"transformer": DiffusionModelSpec, "text_encoder": TextEncoderSpec, "vae": VaeSpec}


# What is done to the bytes of a file


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def flipped(content, draw):
    """A few bits, near the beginning as often as anywhere."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 8, 64))):
        content[draw.randrange(draw.choice((200, 4000, len(content))) % len(content) or 1)] ^= 1 << draw.randrange(8)
    return bytes(content)


def overwritten(content, draw):
    start = draw.randrange(len(content))
    span = draw.randrange(1, 4096)
    return content[:start] + draw.randbytes(span) + content[start + span :]


def lengthened(content, draw):
    return content + draw.randbytes(draw.randrange(1, 4096))


def renamed(content, draw):
    """A name in it is another of the same length."""
    old, new = draw.choice(((b"weight", b"Weight"), (b"blocks", b"block5"), (b"bias", b"bits"), (b"F32", b"I32"),
                            (b"BF16", b"U8  "), (b"shape", b"shade"), (b"256", b"257"), (b"[", b"{")))  # fmt: skip
    return content.replace(old, new, draw.choice((1, 3, -1)))


BYTES = (cut, flipped, overwritten, lengthened, renamed)


# What is done to what a whole file says


def json_changed(content, draw):
    """One value of it is gone, or of another kind."""
    holder = content
    while True:
        key = draw.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
        if not (isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.7):
            break
        holder = holder[key]
    value = draw.choice((None, "x", "12", [], {}, ["a"], {"a": 1}, 0, -1, 3, 1.5, 1e300, True, "gone"))
    if value == "gone":
        del holder[key]
    else:
        holder[key] = value
    return content


def break_json(file, draw):
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = {}
    content = json_changed(content, draw) if content and draw.random() < 0.9 else draw.choice(([], {}, None, 3, "x"))
    file.write_text(json.dumps(content))


def changed(tensor, draw):
    """Of another dtype, of another shape, or of other values."""
    ways = (
        lambda: tensor.to(draw.choice((torch.int8, torch.int64, torch.uint8, torch.bool, torch.float64,
                                       torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu))),
        lambda: draw.choice((tensor.flatten(), tensor.unsqueeze(0), tensor[:0] if tensor.ndim else tensor.view(1))),
        lambda: draw.choice((torch.zeros(()), torch.zeros(3), torch.zeros(100, 16, 1, 2, 2))),
        lambda: tensor.double() * draw.choice((0.0, -1.0, 1e30, 1e300, float("nan"))),
    )  # fmt: skip
    return draw.choice(ways)()


def break_tensors(file, draw):
    """One tensor is gone, changed, or of another name; or the header's mark is another."""
    header = None
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        tensors = load_file(file)
    else:
        tensors = torch.load(file)
        tensors = tensors.get("module", tensors)
    name, key = draw.choice(sorted(tensors)), "_quantization_metadata"
    way = draw.choice(("gone", "changed", "changed", "renamed", "mark"))
    if way == "mark" and key in (header or {}):
        header[key] = json.dumps(json_changed(json.loads(header[key]), draw))
    elif way == "changed":
        tensors[name] = changed(tensors[name], draw).contiguous()
    else:
        tensor = tensors.pop(name)
        if way == "renamed":
            number = draw.choice(("99999", "x", "1", "-1", ""))
            tensors[re.sub(r"\d+", number, name, count=1) if draw.random() < 0.7 else name[:-1]] = tensor
    save_file(tensors, file, metadata=header) if file.suffix == ".safetensors" else torch.save(tensors, file)


# By the suffix of a file.
WHOLE = {".json": break_json, **dict.fromkeys((".safetensors", ".pth", ".pt"), break_tensors)}


def broken(sound, target, draw):
    """A copy of `sound` with one file broken: (that file, how)."""
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(sound, target) if sound.is_dir() else shutil.copyfile(sound, target)
    files = [path for path in sorted(target.rglob("*")) if path.is_file()] if target.is_dir() else [target]
    file = draw.choice(files)
    if file.suffix in WHOLE and file.name != STAGE_FILE and draw.random() < 0.6:
        WHOLE[file.suffix](file, draw)
        return file, WHOLE[file.suffix].__name__
    way = draw.choice(BYTES)
    file.write_bytes(way(file.read_bytes() or b" ", draw))
    return file, way.__name__


# What becomes of it


def kind_of(path, file):
    """What to load of a model or component at `path`, of which `file` is broken."""
    named = next((kind for kind in (*SPECS, "lora") if path.name.startswith(kind)), None)
    inside = "text_encoder" if file.parent.name.startswith(("tokenizer", "text_encoder")) else file.parent.name
    return named or (inside if inside in SPECS else "transformer")


def family_of(path):
    return "hunyuan_video" if "hunyuan" in path.name else "wan"


def load(kind, path, shapes):
    if kind == "lora":
        name = family_of(path)
        read_lora(path, shapes[name], family(name).loras)
        return
    loaded = Components(torch.device("cpu")).get(SPECS[kind](path=str(path)), lambda *_: None)
    network = {"transformer": lambda: loaded.high_noise, "vae": lambda: loaded.network,
               "text_encoder": lambda: loaded.encoders["text_encoder"].model}[kind]()  # fmt: skip
    for name, tensor in network.state_dict().items():
        assert tensor.device.type == "cpu" and torch.isfinite(tensor).all(), f"{name} was half loaded"


def main():
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw, outcomes = random.Random(seed), Counter()
    sound = sorted(path for path in folder.iterdir())
    sound += [path for path in sound if path.name.startswith("diffusers")] * 3  # three networks and a tokenizer
    shapes = {}
    for whole in (path for path in sound if path.name.startswith("transformer")):
        if family_of(whole) not in shapes:
            model = Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(whole)), lambda *_: None)
            own = {name: tuple(parameter.shape) for name, parameter in model.high_noise.named_parameters()}
            shapes[family_of(whole)] = own
    copies = folder.with_name("broken")
    copies.mkdir()
    for number in range(count):
        path = draw.choice(sound)
        file, how = broken(path, copies / path.name, draw)
        kind, where = kind_of(path, file), file if file.parent == copies else file.parent
        try:
            load(kind, copies / path.name, shapes)
            outcomes[f"{family_of(path)} {kind} loaded"] += 1
        except Exception as error:
            told = isinstance(error, ValueError) and str(where) in str(error)
            outcomes[f"{family_of(path)} {kind} refused" if told else "neither"] += 1
            if not told:
                print(f"number {number}, {file}, {how}:\n{traceback.format_exc()}", file=sys.stderr)
    print(json.dumps(outcomes))
    sys.exit(outcomes["neither"])


if __name__ == "__main__":
    main()
