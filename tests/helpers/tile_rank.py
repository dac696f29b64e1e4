"""A rank of a VAE in tiles, for a test: `main()` by gloo_ranks, in FOLDER.

FOLDER holds the VAEs (diffusers folders), cases.json with what each is to do, and what that works on
(inputs.safetensors, by number). The rank writes its part of the results, which lie in memory that all ranks map
(result-NUMBER, in a folder named as the number of ranks if there is one), and what it sent in each case, a list of
[operation, bytes], to sent-RANK.json. Where a case names the bytes that are free on each rank, it is to be refused, and
the rank writes the words to refused-RANK.json. A case may name how the VAE works ("tiles"), and "small" tiles of
HunyuanVideo's. Ranks that pretend to be on several machines work in memory of their machine (a folder of its name).
"""

import json
from functools import partial

import diffusers
import gloo_ranks
import small_tiles
import tiny_models
import torch
import torch.distributed as dist
from ascend_runtime.hardware import devices
from ascend_runtime.parallel import tiles
from ascend_runtime.parallel.machines import machines
from ascend_runtime.engine.video import decode_video, encode_video
from counting_rank import Sent
from safetensors.torch import load_file


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    results = folder / str(ranks) if (folder / str(ranks)).is_dir() else folder
    inputs = load_file(folder / "inputs.safetensors")
    vaes, sent, refused = {}, [], []
    for number, case in enumerate(json.loads((folder / "cases.json").read_text())):
        name = case["vae"]
        if name not in vaes:
            kind = json.loads((folder / name / "config.json").read_text())["_class_name"]
            vaes[name] = tiny_models.on_ranks(getattr(diffusers, kind).from_pretrained(folder / name).eval())
        if case["grid"]:
            tiles.grid_of = lambda *_, grid=case["grid"]: tiles.TileGrid(*map(tuple, grid))
        work = {"decode": decode_video, "encode": encode_video}[case["work"]]
        if "room" in case:
            devices.room = lambda _, free=case["room"][rank]: free
        if case.get("small"):
            small_tiles.use()
        result, options = shared(results, number, case["shape"]), {key: case[key] for key in case.keys() & {"tiles"}}
        if machines().count > 1:
            options["on_written"] = partial(sent_to, result)
            result = shared(results / machines().name_of(rank), number, case["shape"])
        with Sent() as counted:
            try:
                work(vaes[name], inputs[str(number)], result, lambda *_: None, **options)
            except ValueError as error:
                if "room" not in case:
                    raise
                refused.append(str(error))
        sent.append(counted.noted)
    for what, noted in {"sent": sent, "refused": refused}.items():
        (folder / f"{what}-{rank}.json").write_text(json.dumps(noted))
    dist.barrier()
    dist.destroy_process_group()


def sent_to(result, part):
    """What a machine sends of its own memory: a part, which goes to the same place of the result."""
    result.as_strided(part.shape, part.stride(), part.storage_offset()).copy_(part)


def shared(folder, number, shape):
    """The memory of a result, filled with NaN: what no rank writes is seen."""
    return torch.from_file(str(folder / f"result-{number}"), shared=True, size=torch.Size(shape).numel()).view(shape)
