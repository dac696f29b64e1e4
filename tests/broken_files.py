"""Breaks copies of sound files at random, and loads them, for a test: `broken_files.py FOLDER SEED COUNT`.

FOLDER holds sound ones: transformer*, vae*, text_encoder*, lora*, files or folders of them. Prints, as JSON, how many
were refused by a ValueError and how many loaded; ends with an error where some did neither, or half of one.
"""

import json
import random
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from ascend_runtime.checkpoints.lora import read_lora
from ascend_runtime.components import Components
from ascend_runtime.specs import DiffusionModelSpec, TextEncoderSpec, VaeSpec

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


WAYS = (cut, flipped, overwritten, lengthened, renamed)


def broken(sound, target, draw):
    """A copy of `sound` with one file broken; says how."""
    if target.is_dir():
        shutil.rmtree(target)
    shutil.copytree(sound, target) if sound.is_dir() else shutil.copyfile(sound, target)
    files = [path for path in sorted(target.rglob("*")) if path.is_file()] if target.is_dir() else [target]
    file, way = draw.choice(files), draw.choice(WAYS)
    file.write_bytes(way(file.read_bytes() or b" ", draw))
    return f"{file.relative_to(target.parent)}, {way.__name__}"


# What becomes of it


def load(kind, path, shapes):
    if kind == "lora":
        read_lora(path, shapes)
        return
    loaded = Components(torch.device("cpu")).get(SPECS[kind](path=str(path)), lambda *_: None)
    network = {"transformer": "high_noise", "text_encoder": "model"}.get(kind)
    network = getattr(loaded, network) if network else loaded
    for name, tensor in network.state_dict().items():
        assert tensor.device.type == "cpu" and torch.isfinite(tensor).all(), f"{name} was half loaded"


def main():
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw, outcomes = random.Random(seed), Counter()
    sound = sorted(path for path in folder.iterdir())
    whole = next(path for path in sound if path.name.startswith("transformer"))
    model = Components(torch.device("cpu")).get(DiffusionModelSpec(path=str(whole)), lambda *_: None)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.high_noise.named_parameters()}
    copies = folder.with_name("broken")
    copies.mkdir()
    for number in range(count):
        path = draw.choice(sound)
        kind = next(kind for kind in (*SPECS, "lora") if path.name.startswith(kind))
        how = broken(path, copies / path.name, draw)
        try:
            load(kind, copies / path.name, shapes)
            outcomes[f"{kind} loaded"] += 1
        except ValueError:
            outcomes[f"{kind} refused"] += 1
        except Exception:
            outcomes["neither"] += 1
            print(f"number {number}, {how}:\n{traceback.format_exc()}", file=sys.stderr)
    print(json.dumps(outcomes))
    sys.exit(outcomes["neither"])


if __name__ == "__main__":
    main()
