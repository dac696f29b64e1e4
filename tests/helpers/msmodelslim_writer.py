"""Has msModelSlim quantize a transformer on the CPU: `msmodelslim_writer.py SOURCE TARGET HOW`, in its environment.

SOURCE is a .safetensors file, TARGET the folder to be made. HOW: "recipe" takes the processors and the saver of
msModelSlim's own recipe for Wan 2.1, block by block as its runner does; "mxfp8" the same with weights and activations
in that format; "w4a4" its functions for 4 bits, for which it has no such processor; "dynamic", "static" and "timestep"
its older Calibrator, with inputs of its own making.
Only what neither says is done here: a module tree of the file's tensors, as the network itself needs an NPU there.

But for the last three, LAYERS.safetensors next to TARGET holds inputs of quantized layers, and what msModelSlim's own
layers make of them: LAYER.x and LAYER.y.
"""

import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn


STEPS = 3  # of the inputs of "timestep"


class Tree(nn.Module):
    """The layers of a file: nn.Linear for a matrix, a parameter for each other tensor. Calls each linear layer."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            owner, leaf = self._owner(name.split("."))
            if leaf == "weight" and tensor.ndim == 2:
                self._put_linear(name, tensor, tensors.get(f"{name.removesuffix('weight')}bias"))
            elif f"{name.removesuffix('bias')}weight" == name or not isinstance(owner, nn.Linear):
                owner.register_parameter(leaf, nn.Parameter(tensor))
        self.device, self.dtype, self.config = torch.device("cpu"), torch.float32, Config()

    def _owner(self, parts):
        module = self
        for part in parts[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        return module, parts[-1]

    def _put_linear(self, name, weight, bias):
        owner, leaf = self._owner(name.split(".")[:-1])
        linear = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        owner._modules[leaf] = linear

    def forward(self, seed):
        generator = torch.Generator().manual_seed(int(seed))
        return sum(
            layer(torch.randn(4, 16, layer.in_features, generator=generator)).mean()
            for layer in self.modules() if isinstance(layer, nn.Module) and hasattr(layer, "in_features")
        )  # fmt: skip


class Config:
    torch_dtype = torch.bfloat16


class Adapter:
    """What the saver asks of a model's adapter: where the float model's own .json files lie."""

    def __init__(self, folder):
        self.model_path = folder


def by_recipe(tree, target, source, how):
    import msmodelslim.processor  # noqa: PLC0415
    from msmodelslim.core.base.protocol import BatchProcessRequest  # noqa: PLC0415
    from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Config  # noqa: PLC0415
    from msmodelslim.core.quant_service.modelslim_v1.save.mindie_format import MindIEFormatConfig  # noqa: PLC0415
    from msmodelslim.model.interface import IModel  # noqa: PLC0415
    from msmodelslim.processor.base import AutoProcessorConfig, AutoSessionProcessor  # noqa: PLC0415

    recipes = Path(msmodelslim.__file__).parent / "lab_practice" / "wan2_1"
    recipe = yaml.safe_load((recipes / "wan2_1_w8a8_dynamic.yaml").read_text())["spec"]
    saver = MindIEFormatConfig(**recipe["save"][0])
    if how == "mxfp8":
        for part in ("act", "weight"):
            recipe["process"][0]["qconfig"][part] |= {"scope": "per_block", "dtype": "mxfp8"}
    if how == "w4a4":
        put_int4(tree)
        recipe["process"], saver = [], AscendV1Config(part_file_size=0)
    IModel.register(Adapter)
    adapter = Adapter(str(source.parent))
    configs = [AutoProcessorConfig.model_validate(one) for one in recipe["process"]]
    saver.set_save_directory(target)
    processors = [AutoSessionProcessor.from_config(tree, config, adapter) for config in (*configs, saver)]
    for processor in processors:
        processor.pre_run()
    for number, block in tree.blocks.named_children():
        request = BatchProcessRequest(f"blocks.{number}", block, [], [])
        for processor in processors:
            processor.preprocess(request)
            processor.process(request)
            processor.postprocess(request)
    for processor in processors:
        processor.post_run()
    save_file(dict(layers_of(tree)), target.parent / "LAYERS.safetensors")


def put_int4(tree):
    from msmodelslim import ir  # noqa: PLC0415
    from msmodelslim.ir.api import calculate_qparam, quantize  # noqa: PLC0415
    from msmodelslim.ir.qal import QDType, QParam, QScheme, QScope, QStorage  # noqa: PLC0415

    by_token = QParam(scheme=QScheme(scope=QScope.PER_TOKEN, dtype=QDType.INT4, symmetric=True))
    for name, layer in list(tree.blocks.named_modules()):
        if isinstance(layer, nn.Linear) and not name.endswith("ffn.2"):
            weight = layer.weight.detach()
            scales = calculate_qparam(weight.amin(1), weight.amax(1), QDType.INT4, QScope.PER_CHANNEL, True)
            kept = quantize(QStorage(QDType.FLOAT, weight.T), scales).T
            owner, _, leaf = name.rpartition(".")
            tree.blocks.get_submodule(owner)._modules[leaf] = ir.AutoFakeQuantLinear.create(
                by_token, scales, kept, layer.bias
            )


def layers_of(tree):
    generator = torch.Generator().manual_seed(5)
    for name, layer in tree.named_modules():
        if name.startswith("blocks.0.") and "FakeQuantLinear" in type(layer).__name__:
            x = torch.randn(24, layer.weight.shape[1], generator=generator)
            yield f"{name}.x", x
            yield f"{name}.y", layer(x).contiguous()


def by_calibrator(tree, target, how):
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig  # noqa: PLC0415

    left_alone = [name for name, layer in tree.named_modules()
                  if isinstance(layer, nn.Linear) and (not name.startswith("blocks.") or name.endswith("ffn.2"))]
    config = QuantConfig(w_bit=8, dev_type="cpu", is_dynamic=how == "dynamic", mm_tensor=False, act_method=1,
                         disable_names=left_alone)  # fmt: skip
    calls = [[torch.tensor(7)]]
    if how == "timestep":
        config = config.timestep_quant(0)
        calls = [{"timestep_idx": step, "args": [torch.tensor(step)]} for step in range(STEPS)]
    calibrator = Calibrator(tree, config, calib_data=calls, disable_level="L0")
    calibrator.run()
    calibrator.save(str(target), save_type=["safe_tensor"])


def main():
    source, target, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    target.mkdir(parents=True, exist_ok=True)
    tree = Tree(load_file(source)).eval()
    with torch.no_grad():
        if how in ("recipe", "mxfp8", "w4a4"):
            by_recipe(tree, target, source, how)
        else:
            by_calibrator(tree, target, how)


if __name__ == "__main__":
    main()
