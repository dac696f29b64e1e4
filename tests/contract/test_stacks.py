"""(b) Whole stacks of published shapes on "npu", as fake tensors: which operators our blocks ask for, and that nothing
of a block that an NPU has an operator for is spelt out in small ones, that its tokens are copied no more often than
needed, and that the host waits for none.

Contract, not device: the wheels' own meta kernels give the shapes and dtypes.
"""

from collections import Counter

import pytest
import torch
from ascend_runtime.hardware import devices
from ascend_runtime.ops import PlainOperators, ascend
from ascend_runtime.ops.ascend import AscendOperators
from fake_stacks import BF16, FP32, HUNYUAN, INFER, LAYER_NORM, MODELS, TRAINING, WAN, stack_of
from pretend_card import READING
from torch._subclasses.fake_tensor import FakeTensorMode

# What would be there if one of these came apart.
SPELT_OUT = {
    "norm": ("rms_norm", "_fused_rms_norm", "mean", "var_mean", "rsqrt", "pow"),
    "rotary": ("view_as_complex", "complex", "stack", "neg", "cos", "sin"),
    "modulation": ("mul", "div", "sub"),
    "attention": ("_softmax", "bmm", "baddbmm", "matmul", "scaled_dot_product_attention"),
    "gelu": ("gelu", "tanh", "erf", "sigmoid"),
}
WHOLE = [*WAN, "HunyuanVideo 1280x720x129"]  # the others have the same blocks; two of each kind are enough
T2V = {"Wan": "T2V-14B 1280x720x81", "HunyuanVideo": "HunyuanVideo 1280x720x129"}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(devices, "sent", lambda tensor, device: tensor.to(device))  # fake tensors cannot be pinned
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


@pytest.mark.parametrize("model", MODELS)
def test_the_operators_of_a_whole_network(fake, model):
    stack = stack_of(model, depth=None if model in WHOLE else 2)
    calls = stack.run()
    waits = calls.small().intersection(READING)
    for name, kind in stack.kinds.items():
        print(f"\n{model}: {kind.number} x {name}, each {dict(kind.calls)}; {len(waits)} waits for the card")
    assert not waits, "and fake tensors have no values that the host could read"
    assert calls.fused() == stack.blocks() + stack.around
    assert len(calls.of("aten::addcmul")) == stack.of_blocks("gates") + stack.gates_around


@pytest.mark.parametrize("attention", ["auto", "fused", "infer", "laser"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_of_a_block_comes_apart(fake, model, attention):
    stack = stack_of(model, depth=1, attention=attention)
    calls = stack.run_blocks()
    expected = stack.blocks()
    if attention == "fused":
        expected[TRAINING] = expected.pop(INFER)
    if attention == "laser":  # which leaves short sequences to the operator for inference
        whole = len(stack.kinds)
        expected = expected + Counter({"mindiesd::la": whole}) - Counter({INFER: whole})
    assert calls.fused() == expected
    for what, names in SPELT_OUT.items():
        came_apart = calls.small().intersection(names)
        assert not came_apart, f"{what} came apart into {came_apart}"


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_copied_no_more_often_than_needed(fake, model):
    """Joint attention joins query, key and value of two streams, its output, and the block's."""
    stack = stack_of(model, depth=1)
    copies = stack.run_blocks().copies(stack.tokens)
    print(f"\n{model}: {copies} copies of tokens in a block of each kind")
    assert copies == stack.of_blocks("copies")


@pytest.mark.parametrize("model", MODELS)
def test_shapes_and_dtypes(fake, model):
    """Bfloat16 everywhere, and each operator sees whole sequences and heads."""
    stack = stack_of(model, depth=1, attention="infer")
    calls = stack.run_blocks()
    length, heads = stack.length, stack.heads
    assert calls.of(INFER) == [
        (((1, length, heads, 128), *((1, other, heads, 128),) * 2), (BF16,) * 3) for other in stack.attended()
    ]
    rotated = calls.of("npu::npu_rotary_mul")
    assert set(rotated) == {(((1, length, heads, 128), *((1, length, 1, 128),) * 2), (BF16,) * 3)}
    for name in ("npu::npu_rms_norm", LAYER_NORM, "npu::npu_gelu", "mindiesd::adaln", "aten::addcmul"):
        for _, dtypes in calls.of(name):
            assert set(dtypes) == {BF16}, (name, dtypes)
    assert Counter(shapes[0] for shapes, _ in calls.of("npu::npu_rms_norm")) == Counter(stack.rms_normed())
    assert Counter(shapes[0] for shapes, _ in calls.of("npu::npu_gelu")) == Counter(stack.widened())
    empty = [name for name, shapes, _ in calls.made if any(0 in shape for shape in shapes)]
    assert not empty, "some operators of an NPU refuse tensors without values"


@pytest.mark.parametrize("model", WAN)
def test_without_mindiesd(fake, monkeypatch, model):
    """torch_npu alone: the same but for the modulation of each token, which is one multiplication and addition more."""
    monkeypatch.setattr(ascend, "mindiesd", lambda: None)
    stack = stack_of(model, depth=1)
    calls = stack.run_blocks()
    assert not [name for name in calls.fused() if name.startswith("mindiesd")]
    assert len(calls.of(LAYER_NORM)) == 3
    assert len(calls.of("aten::addcmul")) == (4 if stack.per_token else 2)


@pytest.mark.parametrize("model", HUNYUAN)
def test_hunyuan_video_needs_no_mindiesd(fake, monkeypatch, model):
    """Its modulation fits torch_npu's norm, as it is the same for all tokens of a span."""
    monkeypatch.setattr(ascend, "mindiesd", lambda: None)
    stack = stack_of(model, depth=1)
    assert stack.run_blocks().fused() == stack.blocks()


@pytest.mark.parametrize("model", T2V.values())
def test_this_test_sees_a_block_that_comes_apart(fake, monkeypatch, model):
    monkeypatch.setattr(AscendOperators, "rms_norm", PlainOperators.rms_norm)
    calls = stack_of(model, depth=1, layer_norm="fp32").run_blocks()
    assert calls.small().intersection(SPELT_OUT["norm"])
    assert FP32 in calls.of(LAYER_NORM)[0][1]


def test_this_test_sees_tokens_that_are_copied(fake, monkeypatch):
    gelu = AscendOperators.gelu
    monkeypatch.setattr(AscendOperators, "gelu", lambda self, x: gelu(self, torch.cat([x], 1)))
    stack = stack_of(T2V["HunyuanVideo"], depth=1)
    assert stack.run_blocks().copies(stack.tokens) == stack.of_blocks("copies") + 2, "of the video, and of all tokens"


@pytest.mark.parametrize("model", T2V.values())
def test_the_rotary_table_is_freed(fake, model):
    stack = stack_of(model, depth=1)
    stack.run()
    assert stack.network._rotary
    stack.network.forget()
    assert not stack.network._rotary
