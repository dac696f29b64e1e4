"""A node that changes a weight of a MODEL in each way that other packs' LoRA and merge nodes have."""

import comfy.weight_adapter as adapters
import torch
from comfy_api.latest import io

KEY = "diffusion_model.blocks.0.self_attn.q.weight"
BIAS = "diffusion_model.blocks.1.ffn.0.bias"


def drawn(*shape):
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _pair(size, dora=None, reshape=None):
    return adapters.LoRAAdapter(set(), (drawn(size, 2), drawn(2, size), 1.0, None, dora, reshape))


def _patches(what, size):
    """(the patches of core's ModelPatcher.add_patches, the strength of the weight itself)."""
    difference = ("diff", (drawn(size, size),))
    return {
        "a difference": ({KEY: difference}, 1.0),
        "a difference as core once kept it": ({KEY: (drawn(size, size),)}, 1.0),
        "a pair": ({KEY: _pair(size)}, 1.0),
        "the same pair for two weights": (dict.fromkeys((KEY, KEY.replace("q.", "k.")), _pair(size)), 1.0),
        "a difference of another shape": ({KEY: ("diff", (drawn(size, 2 * size),))}, 1.0),
        "matrices of different ranks": (
            {KEY: adapters.LoRAAdapter(set(), (drawn(size, 2), drawn(3, size), 1.0, None, None, None))}, 1.0),
        "DoRA": ({KEY: _pair(size, dora=drawn(size, 1))}, 1.0),
        "another shape": ({KEY: _pair(size, reshape=[2 * size, size])}, 1.0),
        "a padded difference": ({KEY: ("diff", (drawn(2 * size, size), {"pad_weight": True}))}, 1.0),
        "a whole weight": ({KEY: ("set", (drawn(size, size),))}, 1.0),
        "a scaled weight": ({KEY: difference}, 0.5),
        "rows of a weight": ({(KEY, (0, 0, 2)): difference}, 1.0),
        "a function": ({(KEY, None, torch.neg): difference}, 1.0),
        "OFT": ({KEY: adapters.OFTAdapter(set(), (drawn(2, size // 2, size // 2), None, 1.0, None))}, 1.0),
        "another model": ({KEY: [(drawn(size, size), lambda weight, inplace: weight)]}, 1.0),
        "schedule": ({"model_sampling.sigmas": ("diff", (torch.zeros(1000),))}, 1.0),
    }[what]  # fmt: skip


class PatchWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model"), io.String.Input("what"), io.Float.Input("strength")]
        return io.Schema("TestPatchWeights", category="tests", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model, what, strength):
        model = model.clone()
        patches, of_weight = _patches(what, len(model.model.state_dict()[KEY]))
        assert set(model.add_patches(patches, strength, of_weight)) == set(patches)
        return io.NodeOutput(model)
