"""Random LoRA files in LyCORIS's formats, and what each must add to a weight, by its own formula.

The formulas are those of the library LyCORIS (lycoris/functional, lycoris/modules; KohakuBlueleaf/LyCORIS), written as
sums over indices.
"""

import math

import torch
from torch import Tensor

RANK = 3
ALPHA = 2.0
MATRICES = ("pair", "loha", "lokr whole", "lokr small", "lokr large", "lokr both", "diff")
TUCKER = ("pair tucker", "loha tucker", "lokr tucker", "lokr kernel")  # of convolutions


def tensors(form: str, shape: tuple[int, ...], generator: torch.Generator, size=0.1, alpha: float | None = ALPHA):
    """({the end of a key: tensor} of a layer whose weight has this shape, what they add to it at strength 1).

    size: the standard deviation of what they add.
    """
    kind, _, how = form.partition(" ")
    make = {"pair": _pair, "loha": _loha, "lokr": _lokr, "diff": _diff}[kind]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    made, added, rank = make(how, shape, draw)
    if rank is not None and alpha is not None:
        made["alpha"] = torch.tensor(alpha)
        added = alpha / rank * added
    scale = size / added.std()
    first = next(iter(made))
    return made | {first: scale * made[first]}, (scale * added).reshape(shape)


def _pair(how, shape, draw):
    out, into, *kernel = shape
    if how == "tucker":
        up, mid, down = draw(out, RANK, *(1 for _ in kernel)), draw(RANK, RANK, *kernel), draw(RANK, into)
        down = down.view(RANK, into, *(1 for _ in kernel))
        added = torch.einsum("om,mnk,ni->oik", up.flatten(1), mid.flatten(2), down.flatten(1))
        return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid}, added, RANK
    up, down = draw(out, RANK, *(1 for _ in kernel)), draw(RANK, into, *kernel)
    return {"lora_up.weight": up, "lora_down.weight": down}, up.flatten(1) @ down.flatten(1), RANK


def _loha(how, shape, draw):
    out, into, *kernel = shape
    if how == "tucker":
        one, other = [(draw(RANK, out), draw(RANK, into), draw(RANK, RANK, *kernel)) for _ in range(2)]
        added = math.prod(torch.einsum("mo,mnk,ni->oik", a, t.flatten(2), b) for a, b, t in (one, other))
        return {"hada_w1_a": one[0], "hada_w1_b": one[1], "hada_w2_a": other[0], "hada_w2_b": other[1],
                "hada_t1": one[2], "hada_t2": other[2]}, added, RANK  # fmt: skip
    (a1, b1), (a2, b2) = [(draw(out, RANK), draw(RANK, into * math.prod(kernel))) for _ in range(2)]
    made = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return made, torch.einsum("or,ri,os,si->oi", a1, b1, a2, b2), RANK


def _lokr(how, shape, draw):
    """how: which factor is a product: "whole" none, "small" the first, "large" the second, "both"; "tucker": the second
    with a core, "kernel": the second whole, with the kernel in dims of its own."""
    out, into, *kernel = shape
    first, second = (2, 4), (out // 2, into // 4)
    made = {}
    if how in ("small", "both"):
        made |= {"lokr_w1_a": draw(first[0], RANK), "lokr_w1_b": draw(RANK, first[1])}
        one = made["lokr_w1_a"] @ made["lokr_w1_b"]
    else:
        one = made["lokr_w1"] = draw(*first)
    if how == "tucker":
        made |= {"lokr_w2_a": draw(RANK, second[0]), "lokr_w2_b": draw(RANK, second[1]),
                 "lokr_t2": draw(RANK, RANK, *kernel)}  # fmt: skip
        other = torch.einsum("mo,mnk,ni->oik", made["lokr_w2_a"], made["lokr_t2"].flatten(2), made["lokr_w2_b"])
    elif how in ("large", "both"):
        made |= {"lokr_w2_a": draw(second[0], RANK), "lokr_w2_b": draw(RANK, second[1] * math.prod(kernel))}
        other = made["lokr_w2_a"] @ made["lokr_w2_b"]
    elif how == "kernel":
        made["lokr_w2"] = draw(*second, *kernel)
        other = made["lokr_w2"].flatten(2)
    else:
        other = made["lokr_w2"] = draw(second[0], second[1] * math.prod(kernel))
    other = other.reshape(second[0], second[1], -1)
    added = torch.einsum("ab,cdk->acbdk", one, other)
    return made, added, None if how in ("whole", "kernel") else RANK


def _diff(how, shape, draw):
    difference = draw(*shape)
    return {"diff": difference}, difference, None
