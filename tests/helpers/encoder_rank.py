"""A rank that holds its share of a UMT5 text encoder's weights, for a test: `encoder_rank.py FOLDER`.

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


def held(model) -> int:
    """Bytes of the parameters that are here now."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    gathered = [out for module in (model, model.shared, *model.encoder.block)
                for p in module._get_fsdp_state()._fsdp_param_group.fsdp_params
                for out in p.all_gather_outputs]  # fmt: skip
    return sum(p.nbytes for p in own) + sum(out.untyped_storage().nbytes() for out in gathered)


class Stop(Exception):
    pass


def main():
    folder, rank, ranks = gloo_ranks.join()
    spec = TextEncoderSpec(path=str(folder), placement="ranks")
    encoder = Components(torch.device("cpu")).get(spec, lambda *_: None, sharding_of("cpu", ranks, 1, True))
    model = encoder.encoders["text_encoder"].model
    during = []

    def stop(index, total):
        if index == 1:
            during.append(held(model))
            raise Stop

    def encode(on_block=lambda *_: None):
        return encoder.encoding.encode(encoder.encoders, "a red circle", on_block)["text"]

    told = {"share": sum(p.to_local().nbytes for p in model.parameters())}
    sent = Sent()
    with sent:
        embedding = encode()
    told |= {"gathers": [name for name, _ in sent.noted].count("send") // (ranks - 1), "after": held(model)}
    try:
        encode(stop)
    except Stop:
        told |= {"during": during[0], "broken off": held(model)}
    assert torch.equal(encode(), embedding)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
