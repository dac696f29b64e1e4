"""(b) Whole Wan stacks of published shapes on "npu", as fake tensors: which operators our blocks ask for, and that
nothing of a block that an NPU has an operator for is spelt out in small ones, and that the host waits for none.

Contract, not device: the wheels' own meta kernels give the shapes and dtypes.
"""

from collections import Counter
from unittest.mock import patch

import pytest
import torch
from ascend_runtime.hardware import devices
from ascend_runtime.models.wan.context import Context
from ascend_runtime.models.wan.transformer import WanTransformer
from ascend_runtime.models.wan.weights import FP32_PARAMETERS
from ascend_runtime.ops import PlainOperators, ascend
from ascend_runtime.ops.ascend import AscendOperators
from ascend_runtime.specs import OperatorSpec
from card_checks import CAST
from pretend_card import READING
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

NPU = torch.device("npu", 0)
BF16, FP32 = torch.bfloat16, torch.float32
TEXT, IMAGE = 512, 257  # tokens

COMMON = {"attention_head_dim": 128, "text_dim": 4096, "num_layers": 40, "patch_size": (1, 2, 2), "eps": 1e-6}
# As their published configs have them; the latent is [C, T, H, W] of the size that each is published with.
MODELS = {
    "T2V-14B 1280x720x81": (
        {"num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 16, "out_channels": 16}, (16, 21, 90, 160), False),
    "I2V-14B 1280x720x81": (
        {"num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 36, "out_channels": 16, "image_dim": 1280,
         "added_kv_proj_dim": 5120}, (36, 21, 90, 160), False),
    "TI2V-5B 1280x704x121": (
        {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48, "num_layers": 30},
        (48, 31, 44, 80), True),
}  # fmt: skip
LAYER_NORM = "aten::native_layer_norm"  # which torch_npu maps to aclnnLayerNorm
# What would be there if one of these came apart.
SPELT_OUT = {
    "norm": ("rms_norm", "_fused_rms_norm", "mean", "var_mean", "rsqrt", "pow"),
    "rotary": ("view_as_complex", "complex", "stack", "neg", "cos", "sin"),
    "modulation": ("mul", "div", "sub"),
    "attention": ("_softmax", "bmm", "baddbmm", "matmul", "scaled_dot_product_attention"),
    "gelu": ("gelu", "tanh", "erf", "sigmoid"),
}


class Calls(TorchDispatchMode):
    """Notes every operator call: (name, shapes of its tensors, their dtypes)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        tensors = [a for a in (*arguments, *(keywords or {}).values()) if isinstance(a, torch.Tensor)]
        name = operator.name().partition(".")[0]
        self.made.append((name, tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)))
        return operator(*arguments, **(keywords or {}))

    def of(self, name):
        return [(shapes, dtypes) for called, shapes, dtypes in self.made if called == name]


def unpinned():
    """A context in which tensors are sent to a card without being pinned, as fake ones cannot be."""
    return patch.object(devices, "sent", lambda tensor, device: tensor.to(device))


class Stack:
    """A fake network of MODELS and inputs for it, inside the current FakeTensorMode. depth: blocks, all by default."""

    def __init__(self, name, depth=None, **options):
        config, latent, per_token = MODELS[name]
        self.config = {**COMMON, **config}
        self.config["num_layers"] = depth or self.config["num_layers"]
        self.network = WanTransformer(self.config)
        for path, parameter in list(self.network.named_parameters()):
            dtype = FP32 if any(part in path for part in FP32_PARAMETERS) else BF16
            owner, _, last = path.rpartition(".")
            tensor = torch.empty(parameter.shape, dtype=dtype, device=NPU)
            self.network.get_submodule(owner)._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)
        self.network.arrange(AscendOperators(NPU, OperatorSpec(**options), BF16))
        channels, frames, height, width = latent
        self.tokens = frames * height * width // 4
        self.latent = torch.empty(1, *latent, dtype=BF16, device=NPU)
        self.timestep = torch.empty(1, *((self.tokens,) if per_token else ()), device=NPU)
        self.text = torch.empty(1, TEXT, 4096, dtype=BF16, device=NPU)
        self.image = torch.empty(1, IMAGE, 1280, dtype=BF16, device=NPU) if "image_dim" in config else None
        self.depth = self.config["num_layers"]
        self.per_token = per_token
        self.heads = config["num_attention_heads"]
        self.dim = self.heads * 128

    def run(self):
        """The calls of the whole network."""
        with unpinned(), Calls() as calls:
            velocity = self.network(self.latent, self.timestep, Context(self.text, self.image))
        assert velocity.shape == (1, self.config["out_channels"], *self.latent.shape[2:])
        assert velocity.dtype == BF16 and velocity.device == NPU
        return calls

    def run_blocks(self):
        """The calls of its blocks alone."""
        tokens = torch.empty(1, self.tokens, self.dim, dtype=BF16, device=NPU)
        text = torch.empty(1, TEXT, self.dim, dtype=BF16, device=NPU)
        image = None if self.image is None else torch.empty(1, IMAGE, self.dim, dtype=BF16, device=NPU)
        steps = (self.tokens,) if self.per_token else ()
        timestep = torch.empty(1, *steps, 6, self.dim, dtype=BF16, device=NPU)
        with unpinned():
            rotary = self.network._rotary_table(self.latent)
        context = Context(self.text, self.image)
        context.embedded = text, image
        with Calls() as calls:
            for block in self.network.blocks:
                tokens = block(tokens, context, timestep, rotary)
        assert tokens.shape == (1, self.tokens, self.dim) and tokens.dtype == BF16
        return calls


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(devices, "sent", lambda tensor, device: tensor.to(device))  # fake tensors cannot be pinned
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def a_block(stack):
    """How often a block of `stack` is to call each operator of an NPU, with attention "auto" and MindIE SD there."""
    images = 0 if stack.image is None else 1
    by_token = {"mindiesd::adaln": 2, LAYER_NORM: 1}
    norms = by_token if stack.per_token else {LAYER_NORM: 3}
    return Counter({
        "npu::npu_fused_infer_attention_score": 2 + images,
        "npu::npu_rms_norm": 4 + images,
        "npu::npu_rotary_mul": 2,
        "npu::npu_gelu": 1,
        **norms,
    })  # fmt: skip


def npu_calls(calls):
    others = ("aten::", "prim::", f"npu::{CAST}")
    return Counter(name for name, *_ in calls.made if name == LAYER_NORM or not name.startswith(others))


def small_operators(calls):
    return {name.removeprefix("aten::") for name, *_ in calls.made if name.startswith("aten::")}


@pytest.mark.parametrize("model", MODELS)
def test_the_operators_of_a_whole_network(fake, model):
    stack = Stack(model)
    calls = stack.run()
    expected = Counter({name: stack.depth * count for name, count in a_block(stack).items()})
    expected["mindiesd::adaln" if stack.per_token else LAYER_NORM] += 1  # the head's
    expected[LAYER_NORM] += 0 if stack.image is None else 2  # the image embedder's
    waits = small_operators(calls).intersection(READING)
    print(f"\n{model}: {stack.depth} blocks, each {dict(a_block(stack))}; {len(waits)} waits for the card")
    assert not waits, "and fake tensors have no values that the host could read"
    assert npu_calls(calls) == expected
    assert len(calls.of("aten::addcmul")) == 2 * stack.depth, "the two gates of a block"


@pytest.mark.parametrize("attention", ["auto", "fused", "infer", "laser"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_of_a_block_comes_apart(fake, model, attention):
    stack = Stack(model, depth=1, attention=attention)
    calls = stack.run_blocks()
    expected = a_block(stack)
    if attention == "fused":
        expected["npu::npu_fusion_attention"] = expected.pop("npu::npu_fused_infer_attention_score")
    if attention == "laser":  # which leaves short sequences to the operator for inference
        expected += Counter({"mindiesd::la": 1})
        expected["npu::npu_fused_infer_attention_score"] -= 1
    assert npu_calls(calls) == expected
    for what, names in SPELT_OUT.items():
        came_apart = small_operators(calls).intersection(names)
        assert not came_apart, f"{what} came apart into {came_apart}"


@pytest.mark.parametrize("model", MODELS)
def test_shapes_and_dtypes(fake, model):
    """Bfloat16 everywhere, and each operator sees whole sequences and heads."""
    stack = Stack(model, depth=1, attention="infer")
    calls = stack.run_blocks()
    tokens, heads = stack.tokens, stack.heads
    lengths = [tokens, TEXT] + ([] if stack.image is None else [IMAGE])
    attended = calls.of("npu::npu_fused_infer_attention_score")
    assert attended == [
        (((1, tokens, heads, 128), *((1, length, heads, 128),) * 2), (BF16,) * 3) for length in lengths
    ]
    rotated = calls.of("npu::npu_rotary_mul")
    assert rotated == [(((1, tokens, heads, 128), *((1, tokens, 1, 128),) * 2), (BF16,) * 3)] * 2
    for name in ("npu::npu_rms_norm", LAYER_NORM, "npu::npu_gelu", "mindiesd::adaln", "aten::addcmul"):
        for _, dtypes in calls.of(name):
            assert set(dtypes) == {BF16}, (name, dtypes)
    normed = [shapes[0] for shapes, _ in calls.of("npu::npu_rms_norm")]
    assert sorted(normed) == sorted((1, length, stack.dim) for length in [tokens, tokens, *lengths])
    assert [shapes for shapes, _ in calls.of("npu::npu_gelu")] == [((1, tokens, stack.config["ffn_dim"]),)]


@pytest.mark.parametrize("model", MODELS)
def test_without_mindiesd(fake, monkeypatch, model):
    """torch_npu alone: the same but for the modulation of each token, which is one multiplication and addition more."""
    monkeypatch.setattr(ascend, "mindiesd", lambda: None)
    stack = Stack(model, depth=1)
    calls = stack.run_blocks()
    assert not [name for name in npu_calls(calls) if name.startswith("mindiesd")]
    assert len(calls.of(LAYER_NORM)) == 3
    assert len(calls.of("aten::addcmul")) == (4 if stack.per_token else 2)


def test_this_test_sees_a_block_that_comes_apart(fake, monkeypatch):
    monkeypatch.setattr(AscendOperators, "rms_norm", PlainOperators.rms_norm)
    calls = Stack("T2V-14B 1280x720x81", depth=1, layer_norm="fp32").run_blocks()
    assert small_operators(calls).intersection(SPELT_OUT["norm"])
    assert FP32 in calls.of(LAYER_NORM)[0][1]


def test_the_rotary_table_is_freed(fake):
    stack = Stack("T2V-14B 1280x720x81", depth=1)
    stack.run()
    assert stack.network._rotary is not None
    stack.network.forget()
    assert stack.network._rotary is None
