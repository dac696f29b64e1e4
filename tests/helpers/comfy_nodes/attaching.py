"""Nodes that attach to a MODEL or a CONDITIONING what other packs' nodes do."""

import comfy.controlnet
import comfy.patcher_extension
import node_helpers
import torch
from comfy_api.latest import io

CATEGORY = "tests"


def replaces_a_block(args, more):
    return {**more["original_block"](args), "img": args["img"]}


def runs_a_block(args, more):
    return more["original_block"](args)


def attends(*args, **kwargs):
    raise AssertionError("called")


def _injection(model):
    model.set_injections("other_pack", [comfy.patcher_extension.PatcherInjection(attends, attends)])


def _layer(model):
    model.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", attends)


def _compiled(model):
    name = "diffusion_model.blocks.0"
    model.add_object_patch(name, torch.compile(model.get_model_object(name), backend="eager"))


def _option(name, value):
    return lambda model: model.model_options["transformer_options"].update({name: value})


MODELS = {
    "an injection": _injection,
    "a layer": _layer,
    "a compiled layer": _compiled,
    "a weight wrapper": lambda model: model.add_weight_wrapper("diffusion_model.blocks.0.ffn.0.weight", attends),
    "an attention patch": lambda model: model.set_model_attn2_patch(attends),
    "an attention replacement": lambda model: model.set_model_attn1_replace(attends, "middle", 0, 0),
    "a block": lambda model: model.set_model_patch_replace(replaces_a_block, "dit", "double_block", 1),
    "a block as it is": lambda model: model.set_model_patch_replace(runs_a_block, "dit", "double_block", 1),
    "a block that the model lacks": lambda model: model.set_model_patch_replace(
        replaces_a_block, "dit", "double_block", 70),
    "a copy on another device": lambda model: model.deepclone_multigpu(new_load_device=torch.device("cpu")),
    "a save as newer cores do it": lambda model: model.model_state_dict_for_saving(),
    "another attention": _option("optimized_attention_override", attends),
    "an unknown option": _option("of_another_pack", True),
    "a function wrapper": lambda model: model.set_model_unet_function_wrapper(
        lambda apply, of: 0.9 * apply(of["input"], of["timestep"], **of["c"])),
}  # fmt: skip
CONDITIONS = {
    "a ControlNet": lambda: {"control": comfy.controlnet.ControlBase()},
    "gligen": lambda: {"gligen": ("position", None, [])},
    "vace_frames": lambda: {"vace_frames": [torch.zeros(1, 32, 3, 8, 8)]},
    "camera_conditions": lambda: {"camera_conditions": torch.zeros(1, 24, 3, 8, 8)},
    "audio_embed": lambda: {"audio_embed": torch.zeros(1, 2)},
    "further frames": lambda: {"time_dim_concat": torch.full((1, 16, 1, 8, 8), 0.3)},
}


class AttachToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema("TestAttachToModel", category=CATEGORY, outputs=[io.Model.Output()],
                         inputs=[io.Model.Input("model"), io.Combo.Input("what", options=list(MODELS))])  # fmt: skip

    @classmethod
    def execute(cls, model, what):
        model = model.clone()
        MODELS[what](model)
        return io.NodeOutput(model)


class AttachToConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Conditioning.Input("conditioning"), io.Combo.Input("what", options=list(CONDITIONS))]
        return io.Schema("TestAttachToConditioning", category=CATEGORY, inputs=inputs,
                         outputs=[io.Conditioning.Output()])  # fmt: skip

    @classmethod
    def execute(cls, conditioning, what):
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, CONDITIONS[what]()))


class ModelFacts(io.ComfyNode):
    """What a MODEL says to ComfyUI about its memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema("TestModelFacts", category=CATEGORY, is_output_node=True, inputs=[io.Model.Input("model")])

    @classmethod
    def execute(cls, model):
        facts = {"size": model.model_size(), "needed": model.memory_required([2, 16, 21, 90, 160]),
                 "device": str(model.load_device), "parameters": len(list(model.model.diffusion_model.parameters())),
                 "class": type(model.model).__name__, "layers": len(model.model.diffusion_model.blocks)}  # fmt: skip
        return io.NodeOutput(ui={"facts": [facts]})


NODES = (AttachToModel, AttachToConditioning, ModelFacts)
