"""Models in GGUF files equal their dequantized twins: in full and in blocks, on ranks with parts, with LoRAs."""

import itertools

import gguf_files
import hunyuan_formats
import pytest
import random_hunyuan
import random_lora
import random_wan
import torch
from ascend_runtime import DiffusionModelSpec, LoraSpec, ParallelSpec, SampleSpec
from ascend_runtime.components import Components
from ascend_runtime.models.shared.quantized.packed import PackedLinear
from ascend_runtime.models.wan.files.names import to_diffusers_name
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

SHAPE = (1, 16, 2, 4, 6)
LAYERS = 2
NOTE = "stay as the GGUF file has them"


class Models:
    """A random Wan by the original's names, as GGUF files of types, each with a twin in fp32."""

    def __init__(self, folder):
        self._folder = folder
        self._made = {}
        self.state = {
            seed: load_file(random_wan.original_transformer(folder / f"{seed}.safetensors", seed=seed, layers=LAYERS))
            for seed in (21, 22)
        }

    def __call__(self, kind="mixed", seed=21):
        """(the file, its twin)"""
        if (kind, seed) not in self._made:
            file = self._folder / f"wan-{kind}-{seed}.gguf"
            of = gguf_files.mixed() if kind == "mixed" else gguf_files.as_city96(kind)
            self._made[kind, seed] = file, gguf_files.write(file, self.state[seed], of, seed)
        return self._made[kind, seed]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("gguf"))


def text(seed=1):
    return torch.randn(1, 12, random_wan.TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def sample(runtime, path, plan=None, steps=1, **spec):
    how = SampleSpec(steps=steps, seed=5, guidance_scale=1.0, **({} if steps == 1 else {"shift": 5.0}))
    spec = DiffusionModelSpec(path=str(path), dtype="float32", **spec)
    return runtime.sample(spec, how, torch.zeros(SHAPE), text(), -text(), parallel=plan and ParallelSpec(**plan))


def packed_layers(path):
    spec = DiffusionModelSpec(path=str(path), dtype="float32", packed=True)
    network = Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, PackedLinear)}


def notes(result):
    """The number of warnings that say that weights stay in blocks."""
    return sum(NOTE in warning for warning in result.info.get("warnings", ()))


@pytest.mark.parametrize("kind", ["mixed", *gguf_files.TYPES])
def test_a_file_equals_its_dequantized_twin(models, one_rank, kind, request):
    """In full, and with its weights in blocks: a mixed file has all types."""
    if kind != "mixed" and not request.config.getoption("--all-files"):
        pytest.skip("is one of --all-files")
    file, twin = models(kind)
    expected = sample(one_rank, twin).tensor
    for packed in (False, True):
        made = sample(one_rank, file, packed=packed)
        off = float((made.tensor - expected).abs().max())
        print(f"\n{kind}, {'in blocks' if packed else 'in full'}: {off:.1e} off its twin")
        assert off <= 1e-4 and expected.std() > 0.1
        assert notes(made) == (packed and kind not in gguf_files.NUMBERS)
    if kind == "mixed":
        layers = packed_layers(file)
        assert {layer.kind.name for layer in layers.values()} == {*gguf_files.QUANTIZED, *gguf_files.DRAWN}


def test_a_hunyuan_video_equals_its_twin(tmp_path):
    """Whose fused tensors are several layers: rows of a tensor, and columns that begin with a block or within one."""
    config = {"attention_head_dim": 48, "rope_axes_dim": (16, 16, 16)}
    for heads, whole in ((2, True), (1, False)):  # the second's columns are 48 and 192, in blocks of 32
        network = random_hunyuan.transformer(num_attention_heads=heads, **config)
        state = hunyuan_formats.original_transformer(network.state_dict())
        file = tmp_path / f"hunyuan-{heads}.gguf"
        kinds = itertools.cycle(("Q4_0", "Q5_1", "Q8_0"))

        def of(name, shape, kinds=kinds):
            fits = len(shape) == 2 and shape[1] % 32 == 0 and shape[0] > 32
            return next(kinds) if fits and name.startswith(("double", "single")) else "F32"

        twin, made = gguf_files.write(file, state, of, 4, "hyvid"), {}
        for path, packed in ((twin, None), (file, False), (file, True)):
            spec = DiffusionModelSpec(path=str(path), dtype="float32", packed=packed)
            loaded = Components(torch.device("cpu")).get(spec, lambda *_: None).high_noise
            with torch.no_grad():
                made[path, packed] = random_hunyuan.velocity(loaded, random_hunyuan.inputs(loaded.config))
            layers = {name for name, layer in loaded.named_modules() if isinstance(layer, PackedLinear)}
            in_columns = {name for name in layers if "proj_out" in name}
            assert bool(layers) == bool(packed) and bool(in_columns) == (bool(packed) and whole), sorted(layers)
        for packed in (False, True):
            assert_close(made[file, packed], made[twin, None], atol=1e-4, rtol=0.0)


def test_shards_are_given_by_their_folder(models, one_rank, tmp_path):
    state, whole = models.state[21], sample(one_rank, models("F16")[1]).tensor
    names = [*state]
    for number, own in ((1, names[:30]), (2, names[30:])):
        file = tmp_path / f"wan-0000{number}-of-00002.gguf"
        gguf_files.write(file, {name: state[name] for name in own}, gguf_files.as_city96("F16")).unlink()
    assert_close(sample(one_rank, tmp_path).tensor, whole, atol=1e-4, rtol=0.0)
    file.rename(tmp_path / "wan.gguf")
    for path, hint in ((tmp_path / "wan-00001-of-00002.gguf", "Give its folder"),
                       (tmp_path, "Give one of its files, such as wan-00001-of-00002.gguf")):  # fmt: skip
        with pytest.raises(ValueError, match=hint):
            sample(one_rank, path)


PLANS = {
    "slices": {"tp_degree": 2}, "slices in full": {"tp_degree": 2}, "shares": {"fsdp": True},
    "the sequence": {"ulysses_degree": 2, "cfg_degree": 1},
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_make_the_video_of_one(models, two_ranks, one_rank, plan):
    """Also where tensor parallelism cuts within blocks of 256: such a layer is kept in full."""
    file, twin = models()
    expected = sample(one_rank, twin).tensor
    made = sample(two_ranks, file, {"ranks": 2, **PLANS[plan]}, packed=plan != "slices in full")
    assert_close(made.tensor, expected, atol=1e-4, rtol=0.0)
    assert notes(made) == (plan != "slices in full")


def test_two_experts_take_turns(models, one_rank):
    """Two files, in full and in blocks; these must have the same types in both, which shapes do not show."""
    (high, high_twin), (low, low_twin) = models("Q4_0"), models("Q4_0", 22)
    options = {"boundary": 0.9, "steps": 3}
    expected = sample(one_rank, high_twin, low_noise_path=str(low_twin), **options).tensor
    for experts, packed in (("swap", True), ("swap", False), ("resident", True)):
        made = sample(one_rank, high, low_noise_path=str(low), experts=experts, packed=packed, **options)
        assert_close(made.tensor, expected, atol=1e-4, rtol=0.0)
    with pytest.raises(ValueError, match="GGUF files have other types of weights"):
        sample(one_rank, high, low_noise_path=str(models("IQ4_NL", 22)[0]), experts="swap", packed=True, **options)


@pytest.fixture(scope="module")
def lora(models, tmp_path_factory):
    """(a LoRA of all layers, the file's twin that has it merged at 0.8)"""
    folder = tmp_path_factory.mktemp("lora")
    twin = load_file(models()[1])
    own = {to_diffusers_name(name): name for name in twin}
    added = random_lora.save(folder / "lora.safetensors", "lightx2v", {name: twin[key] for name, key in own.items()},
                             seed=3)  # fmt: skip
    merged = {key: twin[key] + 0.8 * added.get(name, 0) for name, key in own.items()}
    save_file(merged, folder / "merged.safetensors")
    return folder / "lora.safetensors", folder / "merged.safetensors"


@pytest.mark.parametrize("plan", [None, {"tp_degree": 2}, {"fsdp": True}], ids=str)
def test_loras_on_blocks_equal_the_merged_twin(models, lora, runtimes, one_rank, plan):
    """They are added to the products of layers in blocks, and merged into the others; nothing is left of them later."""
    ranks = 2 if plan else 1
    how = plan and {"ranks": ranks, **plan}
    plain, expected = (sample(one_rank, file).tensor for file in (models()[1], lora[1]))
    for packed in (True, False) if plan is None else (True,):
        loras = (LoraSpec(path=str(lora[0]), strength=0.8),)
        made = sample(runtimes(ranks), models()[0], how, packed=packed, loras=loras).tensor
        off = float((made - expected).norm() / expected.norm())
        print(f"\n{plan}, {'in blocks' if packed else 'in full'}: {off:.1e} off the merged twin")
        assert off <= 1e-4 < float((plain - expected).norm() / expected.norm())
        assert_close(sample(runtimes(ranks), models()[0], how, packed=packed).tensor, plain, atol=1e-4, rtol=0.0)
