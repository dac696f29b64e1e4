"""Writes weights in ComfyUI's formats of 8 and 4 bits, number by number as the formats define them, and says what they
are worth."""

import json
from functools import lru_cache

import torch
from safetensors.torch import save_file

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
E2M1 = {code: sign * size for sign, first in ((1, 0), (-1, 8))
        for code, size in enumerate((0, 0.5, 1, 1.5, 2, 3, 4, 6), first)}  # fmt: skip
ROTATED = 16  # inputs in a group that tests rotate


@lru_cache
def hadamard(size):
    """The rotation, entry by entry: -1 where an odd number of base-4 digits of row and column sum to 3."""
    def digits(number):
        return [number // 4**place % 4 for place in range(6)]
    odd = torch.tensor([[sum(a + b == 3 for a, b in zip(digits(row), digits(column))) % 2 for column in range(size)]
                        for row in range(size)])  # fmt: skip
    # each of the six digits of a smaller matrix that both lack is 0, and 0 + 0 is not 3
    return (1 - 2 * odd.float()) / size**0.5


def rotated(weight, size):
    """Groups of `size` inputs, each times the rotation."""
    return torch.cat([group @ hadamard(size) for group in weight.split(size, 1)], 1)


def blocked(scales):
    """scales [rows, groups] as cuBLAS reads them, in blocks of 128 rows and 4 groups, padded with zeros."""
    rows, groups = (-(-scales.shape[0] // 128) * 128, -(-scales.shape[1] // 4) * 4)
    row, group = torch.arange(scales.shape[0])[:, None], torch.arange(scales.shape[1])
    places = 512 * (row // 128 * (groups // 4) + group // 4) + 16 * (row % 32) + 4 * (row % 128 // 32) + group % 4
    made = torch.zeros(rows * groups, dtype=torch.uint8)
    made[places] = scales.view(torch.uint8)
    return made.view(rows, groups).view(scales.dtype)


def pairs(low, high):
    return (low.int() % 16 + 16 * (high.int() % 16)).to(torch.uint8).view(torch.int8)


def int8(weight, rows=True, rotation=0):
    """int8_tensorwise: (the layer's tensors, its mark, the weight's worth)."""
    turned = rotated(weight, rotation) if rotation else weight
    scale = (turned.abs().amax(1, keepdim=True) if rows else turned.abs().max()) / 127
    made = (turned / scale).round().to(torch.int8)
    worth = made.float() * scale
    mark = {"format": "int8_tensorwise"} | ({"convrot": True, "convrot_groupsize": rotation} if rotation else {})
    return {"weight": made, "weight_scale": scale}, mark, rotated(worth, rotation) if rotation else worth


def int4(weight):
    """convrot_w4a4"""
    turned = rotated(weight, ROTATED)
    scale = turned.abs().amax(1) / 7
    made = (turned / scale[:, None]).round()
    mark = {"format": "convrot_w4a4", "params": {"convrot_groupsize": ROTATED}}
    worth = rotated(made * scale[:, None], ROTATED)
    return {"weight": pairs(made[:, 0::2], made[:, 1::2]), "weight_scale": scale}, mark, worth


def levels(weight, codebook=True, size=8):
    """asym_w4a8_int8"""
    turned = rotated(weight, ROTATED)
    table = torch.linspace(-1.1, 0.9, 16) if codebook else torch.arange(16.0) - 8
    groups = turned.unflatten(1, (-1, size))
    channel = turned.abs().amax(1) / 127
    relative = (groups.abs().amax(2) / table.abs().max() / channel[:, None]).to(E4M3)
    steps = relative.float()[..., None] * channel[:, None, None]
    places = (groups[..., None] / steps[..., None] - table).abs().argmin(-1).flatten(1)
    integers = (table[places].unflatten(1, (-1, size)) * relative.float()[..., None]).round().clamp(-127, 127)
    mark = {"format": "asym_w4a8_int8", "group_size": size, "convrot_groupsize": ROTATED}
    made = {"weight": pairs(places[:, 0::2], places[:, 1::2]), "weight_s_rel": relative, "weight_s_channel": channel}
    made |= {"weight_codebook": table} if codebook else {}
    return made, mark, rotated(integers.flatten(1) * channel[:, None], ROTATED)


def mxfp8(weight, scale_dtype=torch.uint8):
    groups = weight.unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(2) / 448).log2().ceil()
    made = (groups / 2 ** exponents[..., None]).to(E4M3)
    worth = (made.float() * 2 ** exponents[..., None]).flatten(1)
    scales = blocked((exponents + 127).to(torch.uint8)).view(scale_dtype)
    return {"weight": made.flatten(1), "weight_scale": scales}, {"format": "mxfp8"}, worth


def nvfp4(weight, factors=False, scale_dtype=E4M3):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.rand(weight.shape[1], generator=generator) + 0.5
    divided = weight / inputs if factors else weight
    groups, tensor = divided.unflatten(1, (-1, 16)), divided.abs().max() / (448 * 6)
    scales = (groups.abs().amax(2) / 6 / tensor).to(E4M3)
    sizes = scales.float() * tensor
    codes = (groups[..., None] / sizes[..., None, None] - torch.tensor([*E2M1.values()])).abs().argmin(-1)
    worth = (torch.tensor([*E2M1.values()])[codes] * sizes[..., None]).flatten(1)
    codes = codes.flatten(1)
    made = {"weight": pairs(codes[:, 1::2], codes[:, 0::2]).view(torch.uint8), "weight_scale_2": tensor,
            "weight_scale": blocked(scales).view(scale_dtype)}  # fmt: skip
    made |= {"pre_quant_scale": inputs} if factors else {}
    return made, {"format": "nvfp4"}, worth * inputs if factors else worth


def fp8(weight, rows=False):
    scale = (weight.abs().amax(1, keepdim=True) if rows else weight.abs().max()) / 448
    made = (weight / scale).to(E4M3)
    return {"weight": made, "weight_scale": scale}, {"format": "float8_e4m3fn"}, made.float() * scale


FORMS = {
    "int8 by row": int8,
    "int8 by tensor": lambda weight: int8(weight, rows=False),
    "int8, rotated": lambda weight: int8(weight, rotation=ROTATED),
    "int4": int4,
    "4-bit levels": levels,
    "4-bit integers": lambda weight: levels(weight, codebook=False),
    "mxfp8": mxfp8,
    "mxfp8, its own dtype": lambda weight: mxfp8(weight, E8M0),
    "nvfp4": nvfp4,
    "nvfp4, bytes": lambda weight: nvfp4(weight, scale_dtype=torch.uint8),
    "nvfp4 with factors": lambda weight: nvfp4(weight, factors=True),
    "fp8 by row": lambda weight: fp8(weight, rows=True),
}


def name_of(form):
    """ComfyUI's name of a form."""
    return FORMS[form](torch.ones(32, 32))[1]["format"]


def folder(path, tensors, config, form):
    """A folder of a transformer whose blocks are in this form."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_form(path / "diffusion_pytorch_model.safetensors", tensors, form, lambda layer: layer.startswith("blocks."))
    return path


def as_bytes(mark):
    return torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)


def of_layer(layer, made, mark):
    """The tensors of a marked layer, by their names in a file."""
    return {f"{layer}.{leaf}": x for leaf, x in made.items()} | {f"{layer}.comfy_quant": as_bytes(mark)}


def in_form(tensors, form, chosen=lambda layer: True):
    """(tensors of which the chosen layers' matrices are in this form, what all are worth)."""
    kept, worth = {}, {}
    for name, x in tensors.items():
        layer = name.removesuffix(".weight")
        if x.ndim == 2 and layer != name and chosen(layer):
            made, mark, x = FORMS[form](x.float())
            kept |= of_layer(layer, made, mark)
        else:
            kept[name] = x
        worth[name] = x
    return kept, worth


def with_header_marks(tensors):
    """(tensors without layers' marks, the header that marks them)."""
    marks = {name.removesuffix(".comfy_quant"): json.loads(bytes(x.tolist())) for name, x in tensors.items()
             if name.endswith(".comfy_quant")}  # fmt: skip
    held = {name: x for name, x in tensors.items() if not name.endswith(".comfy_quant")}
    return held, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": marks})}


def save_form(file, tensors, form, chosen=lambda layer: True, in_header=False):
    """Writes a file, and returns what its tensors are worth."""
    kept, worth = in_form(tensors, form, chosen)
    held, header = with_header_marks(kept) if in_header else (kept, None)
    save_file({name: x.contiguous() for name, x in held.items()}, file, metadata=header)
    return worth
