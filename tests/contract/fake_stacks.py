"""Whole networks of published shapes on "npu", as fake tensors, and the operators that they call."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from unittest.mock import patch

import torch
from ascend_runtime.hardware import devices
from ascend_runtime.models.hunyuan_video import context as hunyuan_context
from ascend_runtime.models.hunyuan_video.blocks import Chunk
from ascend_runtime.models.hunyuan_video.transformer import HunyuanVideoTransformer
from ascend_runtime.models.shared.block_stack import EVERYTHING
from ascend_runtime.models.wan import context as wan_context
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import FP32_PARAMETERS
from ascend_runtime.ops.ascend import AscendOperators
from ascend_runtime.specs import OperatorSpec
from card_checks import CAST
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NPU = torch.device("npu", 0)
BF16, FP32 = torch.bfloat16, torch.float32
LAYER_NORM = "aten::native_layer_norm"  # which torch_npu maps to aclnnLayerNorm
INFER, TRAINING = "npu::npu_fused_infer_attention_score", "npu::npu_fusion_attention"
COPYING = {"aten::cat", "aten::clone", "aten::copy_", "aten::_to_copy"}

# As their published configs have them; the latent is [C, T, H, W] of the size that each is published with.
WAN_COMMON = {"attention_head_dim": 128, "text_dim": 4096, "num_layers": 40, "patch_size": (1, 2, 2), "eps": 1e-6}
WAN = {
    "T2V-14B 1280x720x81": (
        {"num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 16, "out_channels": 16}, (16, 21, 90, 160)),
    "I2V-14B 1280x720x81": (
        {"num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 36, "out_channels": 16, "image_dim": 1280,
         "added_kv_proj_dim": 5120}, (36, 21, 90, 160)),
    "TI2V-5B 1280x704x121": (
        {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "num_layers": 30},
        (48, 31, 44, 80)),
}  # fmt: skip
HUNYUAN = {
    "HunyuanVideo 1280x720x129": ({"guidance_embeds": True}, (16, 33, 90, 160)),
    "HunyuanVideo-I2V of 33 channels 1280x720x129": (
        {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"}, (33, 33, 90, 160)),
    "HunyuanVideo-I2V 1280x720x129": (
        {"guidance_embeds": True, "image_condition_type": "token_replace"}, (16, 33, 90, 160)),
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Notes every operator call: (name, shapes of its tensors, their dtypes). A list of tensors counts as tensors."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        tensors = [a for a in tree_leaves((arguments, keywords)) if isinstance(a, torch.Tensor)]
        name = operator.name().partition(".")[0]
        self.made.append((name, tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)))
        return operator(*arguments, **(keywords or {}))

    def of(self, name):
        return [(shapes, dtypes) for called, shapes, dtypes in self.made if called == name]

    def fused(self):
        """How often each operator of an NPU was called."""
        others = ("aten::", "prim::", f"npu::{CAST}")
        return Counter(name for name, *_ in self.made if name == LAYER_NORM or not name.startswith(others))

    def small(self):
        """torch's own operators that were called, but for products with a weight [out, in]."""
        return {name.removeprefix("aten::") for name, shapes, _ in self.made
                if name.startswith("aten::") and not (name == "aten::matmul" and len(shapes[1]) == 2)}  # fmt: skip

    def copies(self, tokens):
        """How often at least so many tokens of a block were copied, in one tensor or a list of them."""
        whole = [sum(shape[1] for shape in shapes if len(shape) > 2)
                 for name, shapes, _ in self.made if name in COPYING]  # fmt: skip
        return sum(copied >= tokens for copied in whole)


def unpinned():
    """A context in which tensors are sent to a card without being pinned, as fake ones cannot be."""
    return patch.object(devices, "sent", lambda tensor, device: tensor.to(device))


@dataclass
class Kind:
    """Blocks of one kind. calls: how often one calls each operator of an NPU, with attention "auto" and MindIE SD
    there. gates: how often it adds a gated update. copies: how often it copies its tokens."""

    number: int
    calls: Counter
    gates: int
    copies: int = 0


@dataclass
class Stack:
    """A fake network and inputs for it, inside the current FakeTensorMode.

    kinds: of its blocks. around: how often the rest of a pass calls each operator of an NPU, and gates_around: how
    often it adds a gated update. tokens: of the video. length: of the sequence of the blocks.
    """

    network: torch.nn.Module
    latent: torch.Tensor
    timestep: torch.Tensor
    tokens: int
    heads: int
    inner: int  # of the feed-forward
    kinds: dict[str, Kind] = field(default_factory=dict)
    around: Counter = field(default_factory=Counter)
    gates_around: int = 0

    @property
    def dim(self):
        return self.heads * 128

    def blocks(self):
        """What all its blocks are to call."""
        return sum((Counter({name: kind.number * count for name, count in kind.calls.items()})
                    for kind in self.kinds.values()), Counter())  # fmt: skip

    def of_blocks(self, what):
        return sum(kind.number * getattr(kind, what) for kind in self.kinds.values())

    def run(self):
        """The calls of the whole network."""
        with unpinned(), Calls() as calls:
            velocity = self.network(self.latent, self.timestep, self.context())
        assert velocity.shape == (1, self.network.config["out_channels"], *self.latent.shape[2:])
        assert velocity.dtype == BF16 and velocity.device == NPU
        return calls

    def run_blocks(self):
        """The calls of its blocks only."""
        tokens = on_card(1, self.length, self.dim)
        arguments = self.of_block()
        with Calls() as calls:
            for block in self.network.blocks:
                tokens = block(tokens, *arguments)
        assert tokens.shape == (1, self.length, self.dim) and tokens.dtype == BF16
        return calls


class WanStack(Stack):
    TEXT, IMAGE = 512, 257  # tokens

    @classmethod
    def of(cls, name, depth, options):
        given, latent = WAN[name]
        config = {**WAN_COMMON, **given}
        config["num_layers"] = depth or config["num_layers"]
        network = _placed(WanTransformer(config), options, FP32_PARAMETERS)
        _, frames, height, width = latent
        tokens = frames * height * width // 4
        per_token = name.startswith("TI2V")
        steps = (tokens,) if per_token else ()
        stack = cls(network, on_card(1, *latent), on_card(1, *steps, dtype=FP32), tokens,
                    config["num_attention_heads"], config["ffn_dim"])  # fmt: skip
        stack.image = on_card(1, cls.IMAGE, 1280) if "image_dim" in config else None
        stack.per_token, stack.steps, stack.length = per_token, steps, tokens
        images = 0 if stack.image is None else 1
        norms = {"mindiesd::adaln": 2, LAYER_NORM: 1} if per_token else {LAYER_NORM: 3}
        calls = Counter({INFER: 2 + images, "npu::npu_rms_norm": 4 + images, "npu::npu_rotary_mul": 2,
                         "npu::npu_gelu": 1, **norms})  # fmt: skip
        casts = 7 if per_token else 0  # a modulation of each token is as large as the tokens, and summed in fp32
        stack.kinds = {"block": Kind(config["num_layers"], calls, gates=2, copies=casts)}
        # The head's, and those of the image embedder.
        stack.around = Counter({"mindiesd::adaln": 1} if per_token else {LAYER_NORM: 1}) + Counter(
            {LAYER_NORM: 2 * images})  # fmt: skip
        return stack

    def context(self):
        return wan_context.Context(on_card(1, self.TEXT, 4096), self.image)

    def of_block(self):
        image = None if self.image is None else on_card(1, self.IMAGE, self.dim)
        context = self.context()
        context.embedded = on_card(1, self.TEXT, self.dim), image
        with unpinned():
            rotary = self.network._rotary_table(self.latent)
        return context, on_card(1, *self.steps, 6, self.dim), rotary

    def attended(self):
        """The lengths of key and value of each attention of one block of each kind."""
        return [self.tokens, self.TEXT] + ([] if self.image is None else [self.IMAGE])

    def rms_normed(self):
        """The shapes of what is RMS-normalised in one block of each kind."""
        return [(1, length, self.dim) for length in [self.tokens] * 2 + self.attended()]

    def widened(self):
        """The shapes of the inner activations of the feed-forwards of one block of each kind."""
        return [(1, self.tokens, self.inner)]


class HunyuanStack(Stack):
    TEXT = 256

    @classmethod
    def of(cls, name, depth, options):
        config, latent = HUNYUAN[name]
        depths = {"num_layers": depth, "num_single_layers": depth} if depth else {}
        network = _placed(HunyuanVideoTransformer({**config, **depths}), options)
        _, frames, height, width = latent
        tokens = frames * height * width // 4
        clean = config.get("image_condition_type") == "token_replace"
        stack = cls(network, on_card(1, *latent), on_card(1, dtype=FP32), tokens, 24, 12288)
        stack.chunk, stack.length = Chunk(tokens, tokens // frames if clean else 0), tokens + cls.TEXT
        config, more = network.config, 1 if clean else 0
        heads = {INFER: 1, "npu::npu_rotary_mul": 2}
        # A clean frame has norms and gates of its own, which overwrite its few tokens: two more in a double block, one
        # in a single one.
        stack.kinds = {
            "double block": Kind(config.num_layers, Counter(
                {**heads, "npu::npu_rms_norm": 4, "npu::npu_gelu": 2, LAYER_NORM: 4 + 2 * more}),
                gates=4 + 2 * more, copies=5),
            "single block": Kind(config.num_single_layers, Counter(
                {**heads, "npu::npu_rms_norm": 2, "npu::npu_gelu": 1, LAYER_NORM: 1 + more}),
                gates=1 + more),
        }  # fmt: skip
        stack.around = Counter({LAYER_NORM: 1 + 2 * config.num_refiner_layers, INFER: config.num_refiner_layers})
        stack.gates_around = 2 * config.num_refiner_layers
        return stack

    def context(self):
        guidance = on_card(1, dtype=FP32) if self.network.config.guidance_embeds else None
        return hunyuan_context.Context(on_card(1, self.TEXT, 4096), on_card(1, 768), guidance)

    def of_block(self):
        vectors = on_card(1, 2 if self.chunk.clean else 1, self.dim)
        with unpinned():
            rotary = self.network._rotary_table(self.latent, self.TEXT)
        return self.chunk, vectors, rotary, partial(EVERYTHING.attention, 0)

    def attended(self):
        return [self.length] * 2

    def rms_normed(self):
        lengths = self.tokens, self.TEXT, self.length
        return [(1, length, self.heads, 128) for length in lengths for _ in "qk"]

    def widened(self):
        return [(1, length, self.inner) for length in (self.tokens, self.TEXT, self.length)]


def on_card(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device=NPU)


def _placed(network, options, fp32=()):
    """The network with parameters on "npu" and its operators. fp32: parts of the names of parameters that are so."""
    for path, parameter in list(network.named_parameters()):
        owner, _, last = path.rpartition(".")
        tensor = on_card(*parameter.shape, dtype=FP32 if any(part in path for part in fp32) else BF16)
        network.get_submodule(owner)._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)
    network.arrange(AscendOperators(NPU, OperatorSpec(**options), BF16))
    return network


MODELS = [*WAN, *HUNYUAN]


def stack_of(name, depth=None, **options):
    """A fake network of WAN or HUNYUAN. depth: the number of blocks of each kind; None: as published."""
    return (WanStack if name in WAN else HunyuanStack).of(name, depth, options)
