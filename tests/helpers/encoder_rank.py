"""A rank that holds its share of the text encoders' weights, for a test: `encoder_rank.py FOLDER`.

RANK and WORLD_SIZE say which of how many. The rank writes what it holds, in bytes, to told-RANK.json. The ranks meet
in a file of the folder, at no port.
"""

import json

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime.components import Components
from ascend_runtime.parallel.fsdp import sharding_of
from ascend_runtime.specs import TextEncoderSpec
from counting_rank import Sent
from torch.distributed.tensor import DTensor

torch.set_grad_enabled(False)


def held(encoder) -> int:
    """Bytes of the parameters that are here now."""
    total = 0
    for part, one in encoder.encoders.items():
        own = [p.to_local() if isinstance(p, DTensor) else p for p in one.model.parameters()]
        groups = [module._get_fsdp_state()._fsdp_param_group
                  for module in (one.model, *encoder.encoding.units(part, one.model))]  # fmt: skip
        gathered = [out for group in groups if group for p in group.fsdp_params for out in p.all_gather_outputs]
        total += sum(p.nbytes for p in own) + sum(out.untyped_storage().nbytes() for out in gathered)
    return total


class Stop(Exception):
    pass


def main():
    folder, rank, ranks = gloo_ranks.join()
    spec = TextEncoderSpec(path=str(folder), placement="ranks")
    encoder = Components(torch.device("cpu")).get(spec, lambda *_: None, sharding_of("cpu", ranks, 1, True))
    models = [one.model for one in encoder.encoders.values()]
    during = []

    def stop(index, total):
        if index == 1:
            during.append(held(encoder))
            raise Stop

    def encode(on_block=lambda *_: None):
        return encoder.encoding.encode(encoder.encoders, "a red circle", on_block)["text"]

    told = {"share": sum(p.to_local().nbytes for model in models for p in model.parameters())}
    sent = Sent()
    with sent:
        embedding = encode()
    told |= {"gathers": [name for name, _ in sent.noted].count("send") // (ranks - 1), "after": held(encoder)}
    try:
        encode(stop)
    except Stop:
        told |= {"during": during[0], "broken off": held(encoder)}
    assert torch.equal(encode(), embedding)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
