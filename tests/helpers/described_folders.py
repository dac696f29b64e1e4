"""Folders as msModelSlim writes them, of random weights, by numpy's arithmetic; and float twins of their layers."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

LEFT_ALONE = ("ffn.2", "ffn.net.2")  # by the recipes for Wan


def quantized_layers(tensors):
    """The names of the layers that the recipes quantize, in the file's own words."""
    names = [name.removesuffix(".weight") for name, x in tensors.items()
             if name.startswith("blocks.") and name.endswith(".weight") and x.ndim == 2]
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
            kept[name] = torch.from_numpy(np.ascontiguousarray(array))
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
    parts, twin = {}, {}
    if smoothed:
        twin["mul_scale"] = parts["mul_scale"] = random.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
        weight = weight / parts["mul_scale"]
    scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    parts["weight"] = whole = np.rint(weight / scale).astype(np.int8)
    twin["weight"] = whole * scale.astype(np.float64)
    if algorithm != "W8A8":
        parts |= {"weight_scale": scale, "weight_offset": np.zeros_like(scale), "bias": bias.astype(np.float32)}
    if algorithm != "W8A8_DYNAMIC":
        steps = 4 if algorithm == "W8A8_TIMESTEP" else 1
        input_scale, offset = np.full(steps, 0.04, np.float32), np.full(steps, 5, np.float32)
        scales = (input_scale[:, None] * scale[:, 0]).astype(np.float32)
        biases = np.rint(bias / scales - whole.astype(np.float64).sum(1) * offset[:, None]).astype(np.int32)
        if steps == 1:
            scales, biases = scales[0], biases[0]
            twin |= {"input_scale": input_scale[0], "input_offset": offset[0]}
        if bits:
            scales = scales.view(np.int32).astype(np.int64)
        parts |= {"input_scale": input_scale, "input_offset": offset, "deq_scale": scales, "quant_bias": biases}
    return parts, twin


def twin_layer(how, x, bias):
    """What a layer computes in fp64 with the weights that its integers stand for, of what 8 bits hold of x."""
    return _rounded(x, how).double() @ torch.from_numpy(how["weight"]).t() + bias.double()


def _rounded(x, how):
    if "mul_scale" in how:
        x = x * torch.from_numpy(how["mul_scale"])
    if "input_scale" in how:
        scale, offset = float(how["input_scale"]), float(how["input_offset"])
        return ((x / scale + offset).round().clamp(-128, 127) - offset) * scale
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, x)
