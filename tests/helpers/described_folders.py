"""Folders as msModelSlim writes them, of random weights, by numpy's arithmetic; and float twins of their layers."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

STEPS = 4  # with static scales of their own
LEFT_ALONE = ("ffn.2", "ffn.net.2")  # by the recipes for Wan


def quantized_layers(tensors):
    """The names of the layers that the recipes quantize, in the file's own words."""
    names = [name.removesuffix(".weight") for name, x in tensors.items()
             if "blocks." in name and "refiner" not in name and name.endswith(".weight") and x.ndim == 2]
    return [name for name in names if not name.endswith(LEFT_ALONE)]


def write(folder, tensors, algorithm="W8A8_DYNAMIC", *, smoothed=False, bits=False, config=None, seed=0):
    """A folder with a description and its weights; tensors: by any system's names.

    smoothed: inputs are to be multiplied first. bits: static scales are kept as whole numbers. Returns {layer: how its
    float twin computes: {weight, mul_scale, input_scale, input_offset}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    said, kept, twins = {}, {}, {}
    layers = quantized_layers(tensors)
    for name, x in tensors.items():
        if name.rpartition(".")[0] not in layers:
            said[name], kept[name] = "FLOAT", x
    for layer in layers:
        parts, twins[layer] = _layer(tensors, layer, algorithm, smoothed, bits, random)
        inner = f"{layer}.linear" if smoothed else layer
        for leaf, array in parts.items():
            name = f"{layer}.div.{leaf}" if leaf == "mul_scale" else f"{inner}.{leaf}"
            said[name] = "FLOAT" if leaf in ("bias", "mul_scale") else algorithm
            kept[name] = array if torch.is_tensor(array) else torch.from_numpy(np.ascontiguousarray(array))
    said["model_quant_type"] = algorithm
    (folder / f"quant_model_description_{algorithm.lower()}.json").write_text(json.dumps(said, indent=2))
    save_file({name: x.contiguous() for name, x in kept.items()},
              folder / f"quant_model_weight_{algorithm.lower()}.safetensors")  # fmt: skip
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return twins


def _layer(tensors, layer, algorithm, smoothed, bits, random):
    weight = tensors[f"{layer}.weight"].double().numpy()
    bias = tensors[f"{layer}.bias"].double().numpy()
    parts, twin = {}, {"algorithm": algorithm}
    if smoothed:
        twin["mul_scale"] = parts["mul_scale"] = random.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
        weight = weight / parts["mul_scale"]
    if algorithm == "W8A8_MXFP8":
        codes, exponents = mxfp8(weight)
        parts |= {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "bias": bias.astype(np.float32),
                  "weight_scale": (exponents + 127).astype(np.uint8)}  # fmt: skip
        return parts, twin | {"weight": from_mxfp8(codes, exponents)}
    largest = 7 if algorithm == "W4A4_DYNAMIC" else 127
    scale = (np.abs(weight).max(1, keepdims=True) / largest).astype(np.float32)
    parts["weight"] = whole = np.rint(weight / scale).astype(np.int8)
    twin["weight"] = whole * scale.astype(np.float64)
    parts["bias"] = bias.astype(np.float32)  # a static layer has it too, and does not use it
    if algorithm != "W8A8":
        parts |= {"weight_scale": scale, "weight_offset": np.zeros_like(scale)}
    if algorithm in ("W8A8", "W8A8_TIMESTEP"):
        steps = STEPS if algorithm == "W8A8_TIMESTEP" else 1
        number = np.arange(steps, dtype=np.float32)
        input_scale, offset = 0.04 + 0.01 * number, 5 + number
        scales = (input_scale[:, None] * scale[:, 0]).astype(np.float32)
        biases = np.rint(bias / scales - whole.astype(np.float64).sum(1) * offset[:, None]).astype(np.int32)
        twin |= {"input_scale": input_scale, "input_offset": offset}
        if steps == 1:
            scales, biases = scales[0], biases[0]
        else:  # as msModelSlim stacks them
            input_scale, offset = input_scale[:, None], offset[:, None]
        if bits:
            scales = scales.view(np.int32).astype(np.int64)
        parts |= {"input_scale": input_scale, "input_offset": offset, "deq_scale": scales, "quant_bias": biases}
    return parts, twin


def twin_layer(how, x, bias, step=None):
    """What a layer computes in fp64 with the weights that its bytes stand for, of what they hold of x. step: the one
    that has static scales; None: dynamically, but for a static layer."""
    return _rounded(x, how, step).double() @ torch.from_numpy(how["weight"]).t() + bias.double()


def _rounded(x, how, step):
    if "mul_scale" in how:
        x = x * torch.from_numpy(how["mul_scale"])
    if how["algorithm"] == "W8A8_MXFP8":
        return torch.from_numpy(from_mxfp8(*mxfp8(x.double().numpy())))
    if how["algorithm"] == "W8A8" or step is not None:
        scale, offset = (float(how[name][step or 0]) for name in ("input_scale", "input_offset"))
        return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
    scale = x.abs().amax(-1, keepdim=True) / (7 if how["algorithm"] == "W4A4_DYNAMIC" else 127)
    return torch.where(scale > 0, (x / scale).round() * scale, x)


# MXFP8 (OCP Microscaling Formats 1.0) by a table of what each of its bytes stands for

GROUP = 32
E4M3 = np.array([(code % 8) / 8 * 2.0**-6 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7)
                 for code in range(127)])  # fmt: skip


def mxfp8(x):
    """(bytes of x's shape, exponents [..., groups]) of x [..., K]: the nearest; of two, the even byte."""
    groups = -(-x.shape[-1] // GROUP)
    padded = np.zeros((*x.shape[:-1], groups * GROUP))
    padded[..., : x.shape[-1]] = x
    padded = padded.reshape(*x.shape[:-1], groups, GROUP)
    largest = np.abs(padded).max(-1)
    exponents = np.where(largest > 0, np.floor(np.log2(np.maximum(largest, 1e-300))) - 8, -126).astype(np.int64)
    magnitudes = np.abs(padded) / 2.0 ** exponents[..., None]
    above = np.searchsorted(E4M3, magnitudes).clip(1, 126)
    up, down = E4M3[above] - magnitudes, magnitudes - E4M3[above - 1]
    codes = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    codes = np.where(padded < 0, codes + 128, codes).astype(np.uint8)
    return codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], exponents


def from_mxfp8(codes, exponents):
    """What they stand for, in fp64."""
    values = np.where(codes < 128, 1, -1) * E4M3[codes % 128]
    return values * np.repeat(2.0**exponents, GROUP, -1)[..., : codes.shape[-1]]
