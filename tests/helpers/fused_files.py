"""A small network, and files in which tensors hold several of its parameters, by rows or by columns, or one in another
order of rows."""

import json

import torch
import torch.distributed.checkpoint
from ascend_runtime.checkpoints.fused import halves_exchanged, layers_of_joined_inputs, layers_of_one_input
from ascend_runtime.ops import PlainOperators
from safetensors.torch import save_file
from torch import nn

WIDTH = 10  # with four ranks, FSDP's shares are of 3, 3, 3 and 1 rows; two slices have 5 rows each
FUSED = {"to_q": 1, "to_k": 1, "to_v": 1, "mlp": 4}
FUSED_LAYERS = ("linear1", "out", "scale_shift")
FP8 = torch.float8_e4m3fn
KINDS = ("safetensors", "torch", "distributed")


class Block(nn.Module):
    """What a block reads from one normed input, an output of two parts, and a modulation (shift | scale)."""

    def __init__(self):
        super().__init__()
        for name, number in FUSED.items():
            setattr(self, name, nn.Linear(WIDTH, number * WIDTH))
        self.out_mixed, self.out_mlp = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH)
        self.mod = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        shift, scale = self.mod(x).chunk(2, -1)
        y = x * (1 + scale) + shift
        mixed = torch.softmax(self.to_q(y) @ self.to_k(y).mT, -1) @ self.to_v(y)
        return x + self.out_mixed(mixed) + self.out_mlp(torch.relu(self.mlp(y)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(WIDTH, 7)
        self.ops = PlainOperators()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rename(name, _):
    return name.removeprefix("net.")


def split(name, shape):
    layer, _, leaf = name.rpartition(".")
    block, _, kind = layer.rpartition(".")
    if kind == "linear1":
        return layers_of_one_input({f"{block}.{own}": number for own, number in FUSED.items()}, leaf, shape)
    if kind == "out":
        return layers_of_joined_inputs({f"{block}.out_mixed": 1, f"{block}.out_mlp": 4}, leaf, shape)
    return halves_exchanged(f"{block}.mod.{leaf}", shape) if kind == "scale_shift" else None


def cut_dim(name):
    layer, leaf = name.split(".")[-2:]
    if layer == "head":
        return None
    if layer in FUSED or layer == "mod":
        return 0
    return 1 if leaf == "weight" else None


def tensors():
    """As they lie in a file."""
    print("seed 11")
    generator, made = torch.Generator().manual_seed(11), {}
    for block in (f"net.blocks.{number}" for number in range(2)):
        sizes = {"linear1": (7 * WIDTH, WIDTH), "out": (WIDTH, 5 * WIDTH), "scale_shift": (2 * WIDTH, WIDTH)}
        for layer, (rows, columns) in sizes.items():
            made[f"{block}.{layer}.weight"] = torch.randn(rows, columns, generator=generator)
            made[f"{block}.{layer}.bias"] = torch.randn(rows, generator=generator)
    head = {"weight": torch.randn(7, WIDTH, generator=generator), "bias": torch.randn(7, generator=generator)}
    return made | {f"net.head.{leaf}": tensor for leaf, tensor in head.items()}


def parameters(held):
    """The network's parameters by plain slices of a file's tensors."""
    made = {}
    for name, tensor in held.items():
        prefix, layer, leaf = name.removeprefix("net.").rsplit(".", 2) if "blocks" in name else ("", "head", name)
        if layer == "linear1":
            parts = tensor.split([WIDTH, WIDTH, WIDTH, 4 * WIDTH])
            made |= {f"{prefix}.{own}.{leaf}": part for own, part in zip(FUSED, parts)}
        elif layer == "out" and leaf == "bias":
            made[f"{prefix}.out_mlp.bias"] = tensor
        elif layer == "out":
            parts = tensor.split([WIDTH, 4 * WIDTH], 1) if leaf == "weight" else (tensor, tensor)
            made |= {f"{prefix}.{own}.{leaf}": part for own, part in zip(("out_mixed", "out_mlp"), parts)}
        elif layer == "scale_shift":
            made[f"{prefix}.mod.{leaf}"] = torch.cat([tensor[WIDTH:], tensor[:WIDTH]])
        else:
            made[name.removeprefix("net.")] = tensor
    return made


def save(kind, path, held):
    if kind == "safetensors":
        save_file(held, path)
    elif kind == "torch":
        torch.save(held, path)
    else:
        torch.distributed.checkpoint.save(held, checkpoint_id=path, no_dist=True)
    return path


def in_8_bits(held, by_row):
    """(what lies in a marked file, what its weights are worth). by_row: whether each row has a scale of its own."""
    kept, worth = {}, dict(held)
    for name, tensor in held.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight":
            scale = tensor.abs().amax(1, keepdim=True) if by_row else tensor.abs().max()
            scale = scale / torch.finfo(FP8).max
            kept[f"{layer}.scale_weight"] = scale
            tensor = (tensor / scale).to(FP8)
            worth[name] = tensor.float() * scale
        kept[name] = tensor
    return kept | {"scaled_fp8": torch.empty(0, dtype=FP8)}, worth


def save_lora(file):
    """Writes pairs and differences of fused layers. Returns what they add to the file's tensors at strength 1."""
    generator, added, held = torch.Generator().manual_seed(12), {}, {}
    for name, tensor in tensors().items():
        layer, _, leaf = name.removeprefix("net.").rpartition(".")
        if leaf == "weight":
            up, down = (torch.randn(size, generator=generator) for size in ((tensor.shape[0], 2), (2, tensor.shape[1])))
            held |= {f"diffusion_model.{layer}.lora_B.weight": up, f"diffusion_model.{layer}.lora_A.weight": down,
                     f"diffusion_model.{layer}.alpha": torch.tensor(3.0)}  # fmt: skip
            added[name] = 1.5 * up @ down
        else:
            added[name] = held[f"diffusion_model.{layer}.diff_b"] = torch.randn(tensor.shape, generator=generator)
    save_file(held, file)
    return added


def described(folder, held):
    """Writes a folder as msModelSlim does, with all its layers in W8A8_DYNAMIC. Returns (integers, scales) by name."""
    made, said, integers = {}, {}, {}
    for name, tensor in held.items():
        name = name.removeprefix("net.")
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer != "head":
            scale = tensor.abs().amax(1, keepdim=True) / 127
            integers[name] = made[name] = (tensor / scale).round().to(torch.int8)
            integers[f"{layer}.weight_scale"] = made[f"{layer}.weight_scale"] = scale
            made[f"{layer}.weight_offset"] = torch.zeros_like(scale)
            said |= {f"{layer}.{own}": "W8A8_DYNAMIC" for own in ("weight", "weight_scale", "weight_offset")}
        else:
            integers[name] = made[name] = tensor
            said[name] = "FLOAT" if layer == "head" else "W8A8_DYNAMIC"
    save_file(made, folder / "quant_model_weight_w8a8_dynamic.safetensors")
    (folder / "quant_model_description_w8a8_dynamic.json").write_text(json.dumps(said))
    return {f"net.{name}": tensor for name, tensor in integers.items()}
