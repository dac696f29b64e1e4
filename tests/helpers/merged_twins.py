"""Float twins of quantized layers with what LoRAs add merged into their weights, in fp64."""

import described_folders
import torch
from ascend_runtime.ops.quantization import quantized_rows

DYNAMIC = "W8A8_DYNAMIC"


def quantized_on_the_fly(weight):
    """How the twin of a layer computes that is quantized from this weight (see described_folders.write)."""
    integers, scale = quantized_rows(weight.float())
    return {"algorithm": DYNAMIC, "weight": (integers * scale).double().numpy()}


class Twin:
    """how: its quantized layer (see described_folders.write). added, of_bias: what LoRAs add to weight and bias.

    rounded: whether what is added sees the input as the quantized layer rounds it, as one merged weight does; else it
    sees the input itself.
    """

    def __init__(self, how, bias, added, of_bias, *, step=None, rounded=True):
        self.how, self.bias, self.step, self.added = dict(how), bias, step, None
        if of_bias is not None:
            self.bias = of_bias if bias is None else bias + of_bias
        if added is not None and rounded:
            factors = self.how.get("mul_scale", 1.0)
            self.how["weight"] = self.how["weight"] + added.double().numpy() / factors
        elif added is not None:
            self.added = added.double()

    def __call__(self, x):
        bias = torch.zeros(len(self.how["weight"])) if self.bias is None else self.bias
        made = described_folders.twin_layer(self.how, x, bias, self.step)
        if self.added is not None:
            made = made + x.double() @ self.added.t()
        return made.to(x.dtype)


def merged(network, hows, biases, added, **how):
    """Replaces the forwards of a network's quantized layers by their merged twins, and merges the rest into its other
    parameters. Returns the twins. hows, biases: by the layer's name; added: by the parameter's."""
    left, twins = dict(added), {}
    for name, one in hows.items():
        weight, bias = (left.pop(f"{name}.{leaf}", None) for leaf in ("weight", "bias"))
        twins[name] = Twin(one, biases.get(name), weight, bias, **how)
        network.get_submodule(name).forward = twins[name]
    for name, difference in left.items():
        parameter = network.get_parameter(name)
        parameter.data = parameter.data + difference.to(parameter)
    return twins
