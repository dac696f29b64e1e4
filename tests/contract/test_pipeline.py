"""(c) The whole pipeline on real ranks, its NPU operators on CPU stand-ins, against the CPU's own way.

Text encoder, sampling with guidance, VAE; one rank, and two with Ulysses, CFG and slices of the weights. Ranks play an
A2, and for a sample an A3; a call that its rules forbid fails. The ranks are those of the
product, started by the product; PYTHONPATH makes them take stand-ins (site/sitecustomize.py), and the variable
ASCEND_RUNTIME_OPERATORS the NPU's operators. Every call of an operator is counted, so that none can go another way.
"""

import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import random_hunyuan
import torch
from ascend_runtime import OperatorSpec, ParallelSpec, Runtime, SampleSpec, VideoSize
from ascend_runtime.specs import AccelerationSpec, RainFusionSpec
from ascend_runtime.specs import DiffusionModelSpec
from tiny_models import wan_vae

HERE = Path(__file__).resolve().parent
RANKS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
SIZE = VideoSize(width=80, height=64, num_frames=9)  # 60 tokens
LONG = VideoSize(width=256, height=256, num_frames=29)  # 2048 tokens, from which on MindIE SD takes laser attention
LAYERS, STEPS, BRANCHES = 2, 2, 2
FORWARDS = STEPS * BRANCHES
SEED = 7
RAINFUSION = AccelerationSpec(rainfusion=RainFusionSpec(sparsity=0.6, start=1))
# In fp32 the largest difference, of normalised latents and of frames in 0..1. In bf16, where the two ways round
# differently and guidance amplifies it, the RMS of the difference, of latents in standard deviations; and the NPU's
# way may be further from fp32 than the CPU's bf16 is by this factor.
# Quantized, a difference in a last digit can become one of a whole step of 1/127.
FP32, BF16, W8A8, FURTHER = 1e-3, 2e-2, 4e-2, 1.25
ATTENTION = {"fused": "npu::npu_fusion_attention", "infer": "npu::npu_fused_infer_attention_score",
             "laser": "mindiesd::la"}  # fmt: skip
ULYSSES, CFG = (ParallelSpec(ranks=2, cfg_degree=c, ulysses_degree=u) for c, u in ((1, 2), (2, 1)))
TP = ParallelSpec(ranks=2, cfg_degree=1, tp_degree=2)


class Group:
    """Ranks whose NPU operators compute on the CPU, and the calls that they made since they were asked last. folder:
    for the notes of these calls, and for the card that they play."""

    def __init__(self, ranks, folder, **variables):
        self._file, self._card, self._read = folder / "calls.txt", folder / "card", 0
        environment = {**RANKS, "PYTHONPATH": os.pathsep.join([str(HERE / "site"), os.environ["PYTHONPATH"]]),
                       "ASCEND_RUNTIME_OPERATORS": "npu", "CONTRACT_CALLS": str(self._file),
                       "CONTRACT_CARD": str(self._card), **variables}  # fmt: skip
        self.runtime = Runtime(ParallelSpec(ranks=ranks), device="cpu", environment=environment)

    def playing(self, card):
        """The same, for jobs on such cards."""
        self._card.write_text(card)
        return self

    def calls(self):
        """[how often rank r called each operator, for r in ranks]"""
        lines = self._file.read_text().splitlines()[self._read :]
        self._read += len(lines)
        counted = Counter(tuple(line.split()) for line in lines)
        ranks = self.runtime.parallel.ranks
        return [{name: n for (rank, name), n in counted.items() if rank == str(r)} for r in range(ranks)]


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """`groups(ranks, without=..., card=...)`: such a group, kept; without: a package that its ranks do not find."""
    made = {}

    def group(ranks, without=None, card="a2"):
        if (ranks, without) not in made:
            variables = {"CONTRACT_WITHOUT": without} if without else {}
            made[ranks, without] = Group(ranks, tmp_path_factory.mktemp("ranks"), **variables)
        return made[ranks, without].playing(card)

    yield group
    for one in made.values():
        one.runtime.stop()


@pytest.fixture(scope="module")
def plain():
    """One rank that computes as a CPU does."""
    with Runtime(ParallelSpec(ranks=1), device="cpu", environment=RANKS) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def expected(plain, specs):
    """The CPU's (latent, frames), made once for each kind of job."""
    known = {}

    def by_the_cpu(**job):
        key = tuple(sorted(job.items()))
        if key not in known:
            known[key] = make(plain, specs, **job)
            assert known[key][0].std() > 0.5
        return known[key]

    return by_the_cpu


def make(
    runtime, specs, *, dtype="float32", size=SIZE, batch=1, plan=None, attention="fused", guidance_scale=4.0,
    quantization="none", acceleration=AccelerationSpec(), fused_all_reduce=False,
):  # fmt: skip
    """(latent, normalised; frames of the first video, or None for a long one)"""
    model = DiffusionModelSpec(path=specs.model.path, dtype=dtype, quantization=quantization)
    texts = [runtime.encode(specs.encoder, prompt).tensor for prompt in ("a red ball moves left to right", "blurry")]
    spec = SampleSpec(seed=SEED, steps=STEPS, guidance_scale=guidance_scale, shift=3.0)
    latent = torch.zeros(batch, *size.latent_shape()[1:])
    operators = OperatorSpec(attention=attention, fused_all_reduce=fused_all_reduce)
    latent = runtime.sample(model, spec, latent, *texts, parallel=plan, operators=operators,
                            acceleration=acceleration).tensor  # fmt: skip
    frames = runtime.decode(specs.vae, latent[:1]).tensor if size is SIZE else None
    config = wan_vae().config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (latent - mean) / std, frames


def assert_equal(made, expected, **job):
    """That the (latent, frames) `made` are the CPU's of the same job."""
    dtype = job.get("dtype", "float32")
    bar = FP32 if dtype == "float32" else W8A8 if "quantization" in job else BF16
    for what, one, other in zip(("latent", "frames"), made, expected(**job)):
        if one is not None:
            unit = other.std() if what == "latent" else 1
            error = (one - other).abs().max() if dtype == "float32" else rms(one - other) / unit
            print(f"{what}: {error:.1e} off in {dtype}, seed {SEED}")
            assert error <= bar, f"{what}: {error:.1e} off in {dtype}"
    if dtype != "float32":
        truth = expected(**{**job, "dtype": "float32"})[0]
        ours, the_cpus = (rms(latent - truth) for latent in (made[0], expected(**job)[0]))
        print(f"from fp32: {ours:.1e}, the CPU {the_cpus:.1e}")
        assert ours <= FURTHER * the_cpus


def rms(x):
    return x.square().mean().sqrt()


def calls_of(attentions, forwards=FORWARDS):
    """What one rank calls in so many passes through the blocks and the head; attentions: those of one block."""
    # A block has two norms of queries and one of keys, turns these of its own tokens, and has one GELU. The text's keys
    # are normalised once a prompt. Layer norms are torch's own.
    rest = {"npu::npu_rms_norm": 3, "npu::npu_rotary_mul": 2, "npu::npu_gelu": 1}
    counts = {name: LAYERS * n for name, n in {**attentions, **rest}.items()}
    passes = {name: n * forwards for name, n in counts.items()}
    prompts = forwards // STEPS
    return {**passes, "npu::npu_rms_norm": passes["npu::npu_rms_norm"] + LAYERS * prompts}


@pytest.mark.parametrize("without", [None, "mindiesd"])
@pytest.mark.parametrize("dtype, attention", [("float32", "fused"), ("bfloat16", "fused"), ("bfloat16", "infer")])
def test_one_rank(groups, specs, expected, dtype, attention, without):
    group = groups(1, without)
    made = make(group.runtime, specs, dtype=dtype, attention=attention)
    assert group.calls() == [calls_of({ATTENTION[attention]: 2})]
    assert_equal(made, expected, dtype=dtype)


@pytest.mark.parametrize("dtype, attention", [("float32", "fused"), ("bfloat16", "infer")])
@pytest.mark.parametrize("plan", [ULYSSES, CFG], ids=["ulysses", "cfg"])
def test_two_ranks(groups, specs, expected, plan, dtype, attention):
    group = groups(2)
    made = make(group.runtime, specs, dtype=dtype, plan=plan, attention=attention)
    assert group.calls() == [calls_of({ATTENTION[attention]: 2}, FORWARDS // plan.cfg_degree)] * 2
    assert_equal(made, expected, dtype=dtype)


A3 = [
    ("float32", "auto", None, {}),  # by basic operators
    ("bfloat16", "auto", None, {ATTENTION["infer"]: 2}),
    ("bfloat16", "fused", None, {ATTENTION["infer"]: 2}),  # with a warning
    ("bfloat16", "auto", ULYSSES, {ATTENTION["infer"]: 2}),
]


@pytest.mark.parametrize("dtype, attention, plan, attentions", A3)
def test_an_a3(groups, specs, expected, dtype, attention, plan, attentions):
    group = groups(2 if plan else 1, card="a3")
    made = make(group.runtime, specs, dtype=dtype, attention=attention, plan=plan)
    assert group.calls() == [calls_of(attentions)] * (2 if plan else 1)
    assert_equal(made, expected, dtype=dtype)


@pytest.mark.parametrize("card, fused", [("a2", True), ("a3", False)])
def test_slices(groups, specs, expected, card, fused):
    """Three linears of a block are summed over slices, two of its own tokens' and one of the text's: on an A2 by the
    operator that also multiplies, if the user turns it on."""
    group = groups(2, card=card)
    made = make(group.runtime, specs, dtype="bfloat16", attention="auto", plan=TP, fused_all_reduce=True)
    for calls in group.calls():
        assert calls.get("npu::npu_mm_all_reduce_base", 0) == (LAYERS * 3 * FORWARDS if fused else 0)
        assert calls[ATTENTION["infer"]] == LAYERS * 2 * FORWARDS
    assert_equal(made, expected, dtype="bfloat16")


@pytest.mark.parametrize("plan", [None, ULYSSES, TP], ids=["one rank", "ulysses", "slices"])
def test_quantized(groups, specs, expected, plan):
    """A block has nine linears that are quantized, of which two see the text, once a prompt. Those that are summed over
    slices have the scales of whole tokens, which are exchanged."""
    group = groups(2 if plan else 1)
    made = make(group.runtime, specs, dtype="bfloat16", plan=plan, quantization="w8a8_dynamic")
    products = LAYERS * (7 * FORWARDS + 2 * BRANCHES)
    for calls in group.calls():
        assert calls["npu::npu_quant_matmul"] == products
        assert calls["npu::npu_dynamic_quant"] == products - (LAYERS * 2 * FORWARDS if plan is TP else 0)
    assert_equal(made, expected, dtype="bfloat16", quantization="w8a8_dynamic")


@pytest.mark.parametrize("ranks", [1, 2])
def test_laser_attention(groups, specs, expected, ranks):
    """Of a sequence with itself; with the text, which is short, by the operator for inference."""
    group = groups(ranks)
    plan = ULYSSES if ranks == 2 else None
    made = make(group.runtime, specs, dtype="bfloat16", attention="laser", size=LONG, plan=plan)
    assert group.calls() == [calls_of({ATTENTION["laser"]: 1, ATTENTION["infer"]: 1})] * ranks
    assert_equal(made, expected, dtype="bfloat16", size=LONG)


# HunyuanVideo: two blocks of each kind, and two of the text's refiner. A rank without text has one stream less.
CHUNKS = {1: [(60, 7)], 2: [(34, 0), (26, 8)]}  # tokens of video and text, with padding, of each rank of a sequence
DOUBLE, SINGLE, REFINER = 2, 2, 2


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory):
    return str(random_hunyuan.folder(tmp_path_factory.mktemp("hunyuan"), "t2v"))


def hunyuan_latent(
    runtime, path, *, dtype, attention="auto", plan=None, quantization="none", fused_all_reduce=False, size=SIZE,
    acceleration=AccelerationSpec(),
):  # fmt: skip
    """Normalised, of a job with embedded guidance only."""
    given = random_hunyuan.conditioning(seed=SEED)
    model = DiffusionModelSpec(path=path, dtype=dtype, quantization=quantization)
    made = runtime.sample(model, SampleSpec(seed=SEED, steps=STEPS), torch.zeros(size.latent_shape()), given,
                          parallel=plan, acceleration=acceleration,
                          operators=OperatorSpec(attention=attention, fused_all_reduce=fused_all_reduce))  # fmt: skip
    return made.tensor * random_hunyuan.vae().config.scaling_factor


def hunyuan_calls(attention, tokens):
    """What a rank calls with so many tokens of video and text."""
    streams = sum(length > 0 for length in tokens)
    counts = {"npu::npu_rms_norm": 2 * (DOUBLE * streams + SINGLE), "npu::npu_rotary_mul": 2 * (DOUBLE + SINGLE),
              "npu::npu_gelu": DOUBLE * streams + SINGLE}  # fmt: skip
    counts |= {ATTENTION[attention]: DOUBLE + SINGLE + REFINER} if attention else {}
    return {name: STEPS * count for name, count in counts.items()}


@pytest.fixture(scope="module")
def hunyuan_expected(plain, hunyuan):
    """The CPU's latent of a job."""
    return cache(lambda **job: hunyuan_latent(plain, hunyuan, **job))


def assert_hunyuan(made, expected, dtype, quantization="none", **job):
    other, truth = expected(dtype=dtype, quantization=quantization, **job), expected(dtype="float32", **job)
    error = (made - other).abs().max() if dtype == "float32" else rms(made - other) / other.std()
    print(f"{error:.1e} off in {dtype}, {quantization}, seed {SEED}")
    assert other.std() > 0.5
    assert error <= (FP32 if dtype == "float32" else BF16 if quantization == "none" else W8A8)
    assert dtype == "float32" or rms(made - truth) <= FURTHER * rms(other - truth)


@pytest.mark.parametrize("dtype, attention, card, called", [
    ("float32", "fused", "a2", "fused"), ("bfloat16", "fused", "a2", "fused"), ("bfloat16", "auto", "a2", "infer"),
    ("float32", "auto", "a3", None), ("bfloat16", "fused", "a3", "infer"),
])  # fmt: skip
def test_hunyuan_video_on_one_rank(groups, hunyuan, hunyuan_expected, dtype, attention, card, called):
    group = groups(1, card=card)
    made = hunyuan_latent(group.runtime, hunyuan, dtype=dtype, attention=attention)
    assert group.calls() == [hunyuan_calls(called, CHUNKS[1][0])]
    assert_hunyuan(made, hunyuan_expected, dtype)


@pytest.mark.parametrize("dtype, card", [("float32", "a2"), ("bfloat16", "a3")])
def test_hunyuan_video_on_two_ranks(groups, hunyuan, hunyuan_expected, dtype, card):
    """Text is the tail of the sequence: one rank has none."""
    group = groups(2, card=card)
    made = hunyuan_latent(group.runtime, hunyuan, dtype=dtype, plan=ULYSSES)
    called = "fused" if dtype == "float32" else "infer"
    assert group.calls() == [hunyuan_calls(called, tokens) for tokens in CHUNKS[2]]
    assert_hunyuan(made, hunyuan_expected, dtype)


@pytest.mark.parametrize("quantization", ["none", "w8a8_dynamic"])
def test_hunyuan_video_in_slices(groups, hunyuan, hunyuan_expected, quantization):
    """Four linears of a double block are summed over slices, by the operator that also multiplies where they are not
    quantized; of a single block two, whose sum is summed once."""
    group = groups(2)
    made = hunyuan_latent(group.runtime, hunyuan, dtype="bfloat16", plan=TP, quantization=quantization,
                          fused_all_reduce=True)  # fmt: skip
    for calls in group.calls():
        fused = DOUBLE * (4 if quantization == "none" else 2)  # a feed-forward's second layer stays as it is
        assert calls["npu::npu_mm_all_reduce_base"] == STEPS * fused
        in_8_bits = DOUBLE * 2 * 5 + SINGLE * 5  # query, key, value, output, and the feed-forward's first layer
        assert calls.get("npu::npu_quant_matmul", 0) == (0 if quantization == "none" else STEPS * in_8_bits)
    assert_hunyuan(made, hunyuan_expected, "bfloat16", quantization)


@pytest.mark.parametrize("ranks", [1, 2])
def test_hunyuan_video_with_rainfusion(groups, hunyuan, hunyuan_expected, ranks):
    """The second step is sparse, and text is attended in it too; the refiner's attention stays dense."""
    group, job = groups(ranks), {"size": LONG, "acceleration": RAINFUSION}
    made = hunyuan_latent(group.runtime, hunyuan, dtype="bfloat16", plan=ULYSSES if ranks == 2 else None, **job)
    for calls in group.calls():
        assert calls["mindiesd::rainfusionattention"] == DOUBLE + SINGLE
        assert calls[ATTENTION["infer"]] == DOUBLE + SINGLE + STEPS * REFINER
    assert_hunyuan(made, hunyuan_expected, "bfloat16", **job)


@pytest.mark.parametrize("without", [None, "mindiesd"])
def test_two_videos(groups, specs, expected, without):
    """Each has a modulation of its own, which MindIE SD's norm takes; torch_npu's alone does not."""
    group = groups(1, without)
    made = make(group.runtime, specs, batch=2)
    (calls,) = group.calls()
    modulated = (LAYERS * 2 + 1) * FORWARDS
    assert calls.get("mindiesd::adaln", 0) == (0 if without else modulated)
    assert_equal(made, expected, batch=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rainfusion(groups, specs, expected, ranks):
    """The second step is sparse."""
    group = groups(ranks)
    plan = ULYSSES if ranks == 2 else None
    job = {"dtype": "bfloat16", "size": LONG, "acceleration": RAINFUSION}
    made = make(group.runtime, specs, plan=plan, **job)
    dense, sparse = LAYERS * FORWARDS, LAYERS * BRANCHES
    for calls in group.calls():
        assert calls["mindiesd::rainfusionattention"] == sparse
        assert calls[ATTENTION["fused"]] == 2 * dense - sparse
    assert_equal(made, expected, **job)


@pytest.mark.parametrize("dtype, without, says", [("float32", None, "Set dtype"), ("bfloat16", "mindiesd", "Install")])
def test_rainfusion_that_no_operator_computes_is_refused(groups, specs, dtype, without, says):
    group = groups(1, without)
    with pytest.raises(ValueError, match=says):
        make(group.runtime, specs, dtype=dtype, acceleration=RAINFUSION)
    assert group.calls() == [{}]


def test_laser_attention_without_mindiesd_is_refused(groups, specs):
    group = groups(1, "mindiesd")
    with pytest.raises(ValueError, match="mindiesd cannot be imported"):
        make(group.runtime, specs, dtype="bfloat16", attention="laser")
    assert group.calls() == [{}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_this_test_sees_a_difference(plain, specs, expected, dtype):
    """Of half a unit in the guidance scale, say."""
    other = make(plain, specs, dtype=dtype, guidance_scale=4.5)
    with pytest.raises(AssertionError, match="latent: .* off"):
        assert_equal(other, expected, dtype=dtype)
