"""GGUF files: their headers, the numbers in their blocks, the parts that ranks read, and what is refused."""

import os
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from ascend_runtime.checkpoints.codings.coding import numbers_in
from ascend_runtime.checkpoints.codings.ggml import block_codings
from ascend_runtime.checkpoints.formats.gguf_header import read_header
from ascend_runtime.checkpoints.opening import open_tensors
from ascend_runtime.ops.blocks.ggml import BLOCK_TYPES, dequantized
from gguf_files import TYPES, encoded, random_blocks, type_named, write
from safetensors.torch import load_file

ROWS, COLUMNS = 24, 1024


@pytest.fixture
def draw(rng):
    return np.random.default_rng(rng.randrange(2**32))


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """(a file with a matrix of each type, what it holds in fp32)"""
    generator = torch.Generator().manual_seed(4)
    state = {kind: torch.randn(ROWS, COLUMNS, generator=generator) for kind in TYPES}
    state |= {"conv": torch.randn(256, 16, 1, 2, 2, generator=generator), "norm": torch.randn(300, generator=generator)}
    file = tmp_path_factory.mktemp("gguf") / "every.gguf"
    kinds = {name: name for name in TYPES} | {"conv": "Q8_0", "norm": "F32"}
    twin = write(file, state, lambda name, shape: kinds[name], matrices=("conv",))
    return file, load_file(twin)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_on_a_device_are_dequantized_as_the_gguf_package_does(kind, draw):
    """Of all bytes that there are, scales that are not numbers included; in rows that need several turns."""
    values, nbytes = gguf.GGML_QUANT_SIZES[type_named(kind)]
    assert (BLOCK_TYPES[kind].values, BLOCK_TYPES[kind].nbytes) == (values, nbytes)
    blocks = draw.integers(0, 256, (7, 2048 // values * nbytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        expected = torch.from_numpy(gguf.dequantize(blocks, type_named(kind)))
    made = dequantized(torch.from_numpy(blocks), BLOCK_TYPES[kind], torch.float32)
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=0, equal_nan=True)
    finite = torch.from_numpy(random_blocks(kind, 5, 2048, draw))
    in_16_bits = dequantized(finite, BLOCK_TYPES[kind], torch.bfloat16)
    assert torch.equal(in_16_bits, dequantized(finite, BLOCK_TYPES[kind], torch.float32).bfloat16())


def test_a_header_says_what_the_gguf_package_reads(every_type):
    file, expected = every_type
    ours, theirs = read_header(file), gguf.GGUFReader(file)
    assert {one.name: (one.tensor_type.name, tuple(reversed(one.shape.tolist())), one.data_offset, one.n_bytes)
            for one in theirs.tensors} == {
        name: (one.kind, one.shape, one.start, one.nbytes) for name, one in ours.tensors.items()}  # fmt: skip
    assert ours.fields["general.architecture"] == "wan"
    with open_tensors(file) as opened:
        assert opened.shapes == {name: tuple(x.shape) for name, x in expected.items()}


@pytest.fixture
def bytes_read(monkeypatch):
    counts = []

    def preadv(*arguments, original=os.preadv):
        counts.append(original(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    return counts


def test_a_part_comes_without_the_rest(every_type, bytes_read, rng):
    """Rows and columns: no byte but those of the blocks that the part touches."""
    file, expected = every_type
    with open_tensors(file) as opened:
        codings = block_codings(opened).weights
        for kind, coding in codings.items():
            if kind == "conv":  # it was stored as a matrix of another shape
                part = slice(3, 9), *[slice(None)] * 4
                assert torch.equal(numbers_in(coding, opened, kind, part), expected[kind][3:9])
                continue
            low, high = sorted(rng.sample(range(COLUMNS + 1), 2))
            first, last = sorted(rng.sample(range(ROWS + 1), 2))
            bytes_read.clear()
            made = numbers_in(coding, opened, kind, (slice(first, last), slice(low, high)))
            assert torch.equal(made, expected[kind][first:last, low:high]), (kind, first, last, low, high)
            blocks = -(-high // coding.grain) - low // coding.grain
            assert sum(bytes_read) == (last - first) * blocks * coding.grain * coding.bits / 8, kind


def test_rows_of_a_llama_come_in_order(tmp_path, draw):
    """A head's two halves are interleaved in the file, as llama.cpp's conversion leaves them; read whole or in part."""
    heads, size, width = 4, 8, 64
    weight = torch.randn(heads * size, width, generator=torch.Generator().manual_seed(1))
    turned = weight.view(heads, 2, size // 2, width).transpose(1, 2).reshape(heads * size, width)
    state = {"blk.0.attn_q.weight": turned, "blk.0.attn_v.weight": turned, "rope_freqs.weight": torch.ones(4)}
    for kind in ("F32", "Q8_0"):
        file = tmp_path / f"{kind}.gguf"
        write(file, state, lambda name, shape: kind if len(shape) == 2 else "F32", architecture="llama",
              fields=lambda writer: writer.add_head_count(heads))  # fmt: skip
        expected = torch.from_numpy(gguf.dequantize(encoded(weight, kind, draw), type_named(kind)).copy())
        query, value = (f"model.layers.0.self_attn.{one}_proj.weight" for one in "qv")
        with open_tensors(file) as opened:
            coding = block_codings(opened).weights.get(query)
            for rows in (slice(0, 32), slice(3, 11), slice(8, 16), slice(31, 32), slice(5, 5)):
                part = (rows, slice(0, width))
                made = opened.read(query, part) if coding is None else coding.numbers(opened, query, part)
                assert torch.equal(made, expected[rows]), (kind, rows)
            assert not torch.equal(opened.read(value)[:8], opened.read(query)[:8])


# What is refused


def header(version=3, tensors=0, fields=0):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def text(content):
    return struct.pack("<Q", len(content)) + content


def info(name=b"a", dims=(256,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def field(key=b"k", kind=4, value=struct.pack("<I", 1)):
    return text(key) + struct.pack("<I", kind) + value


def listed(kind, count, content=b""):
    return field(kind=9, value=struct.pack("<IQ", kind, count) + content)


def info_of_shape(*shape):
    return field(b"comfy.gguf.orig_shape.a", 9, struct.pack(f"<IQ{len(shape)}i", 5, len(shape), *shape))


ENOUGH = bytes(2048)
BROKEN = {
    "no header": b"GGUF",
    "cut off in its header": header(tensors=1) + info()[:9],
    "cut off in its tensors": header(tensors=1) + info(),
    "another version": header(version=9) + ENOUGH,
    "the other order of bytes": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + ENOUGH,
    "many tensors": header(tensors=2**63) + ENOUGH,
    "many fields": header(fields=2**63) + ENOUGH,
    "a long name": header(tensors=1) + info(b"n" * 3000) + ENOUGH,
    "a name longer than the file": header(tensors=1) + struct.pack("<Q", 2**62) + ENOUGH,
    "a name that is no text": header(tensors=1) + info(b"\xff\xfe") + ENOUGH,
    "a name with escapes": header(tensors=1) + info(b"\x1b[2J") + ENOUGH,
    "many dims": header(tensors=1) + info(dims=(1,) * 90) + ENOUGH,
    "a huge shape": header(tensors=1) + info(dims=(2**40, 2**40)) + ENOUGH,
    "a type that is unknown": header(tensors=1) + info(kind=77) + ENOUGH,
    "a type that was removed": header(tensors=1) + info(kind=4) + ENOUGH,
    "half a block": header(tensors=1) + info(dims=(100,), kind=12) + ENOUGH,
    "a scalar in blocks": header(tensors=1) + info(dims=(), kind=12) + ENOUGH,
    "an offset between multiples": header(tensors=1) + info(offset=7) + ENOUGH,
    "an offset behind the end": header(tensors=1) + info(offset=2**40) + ENOUGH,
    "tensors that overlap": header(tensors=2) + info(b"a") + info(b"b", offset=32) + ENOUGH * 2,
    "one name twice": header(tensors=2) + info(b"a") + info(b"a", offset=1024) + ENOUGH * 2,
    "one key twice": header(fields=2) + field() + field() + ENOUGH,
    "no alignment": header(fields=1) + field(b"general.alignment", value=struct.pack("<I", 0)) + ENOUGH,
    "an odd alignment": header(fields=1) + field(b"general.alignment", value=struct.pack("<I", 48)) + ENOUGH,
    "a huge alignment": header(fields=1) + field(b"general.alignment", value=struct.pack("<I", 2**31)) + ENOUGH,
    "a field of an unknown type": header(fields=1) + field(kind=99) + ENOUGH,
    "lists of lists": header(fields=1) + listed(9, 1, struct.pack("<IQ", 9, 1) * 2000) + ENOUGH,
    "a list longer than the file": header(fields=1) + listed(0, 2**62) + ENOUGH,
    "a list of many numbers": header(fields=1) + listed(10, 2**40) + ENOUGH,
    "a list of many texts": header(fields=1) + listed(8, 2**61) + ENOUGH,
    "texts that end too soon": header(fields=1) + listed(8, 1_999_999, bytes(8) * 20) + ENOUGH,
    "another original shape": header(3, 1, 1) + info_of_shape(4, 8, 9) + info() + ENOUGH,
    "an original shape below 0": header(3, 1, 1) + info_of_shape(-16, -16) + info() + ENOUGH,
    "a Llama without heads": header(3, 1, 1) + field(b"general.architecture", 8, text(b"llama"))
    + info(b"blk.0.attn_q.weight", (16, 16)) + ENOUGH,
    "a T5 with one name twice": header(3, 2, 1) + field(b"general.architecture", 8, text(b"t5"))
    + info(b"shared.weight", (16, 16)) + info(b"token_embd.weight", (16, 16), offset=1024) + ENOUGH * 2,
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path, what):
    """At once, whatever numbers it holds."""
    file = tmp_path / "wan.gguf"
    file.write_bytes(BROKEN[what])
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:
        with open_tensors(file):
            pass
    took = time.monotonic() - began
    message = str(caught.value)
    print(f"\n{what}: {message} ({took:.2f} s)")
    assert message.startswith("AV-") and str(file) in message and len(message) < 1000 and message.isprintable()
    assert took < 2


def test_types_that_the_package_does_not_know_are_refused(tmp_path):
    file = tmp_path / "wan.gguf"
    file.write_bytes(header(tensors=1) + info(b"blocks.0.w", (256, 4), 15) + bytes(4096))  # Q8_K, for sums only
    with open_tensors(file) as opened, pytest.raises(ValueError, match="AV-1305.*Q8_K"):
        block_codings(opened)


def test_a_file_cut_at_any_byte_is_refused(every_type, tmp_path, rng):
    content, cut = every_type[0].read_bytes(), tmp_path / "cut.gguf"
    end = max(one.start + one.nbytes for one in read_header(every_type[0]).tensors.values())  # padding comes after it
    for length in [*rng.sample(range(end), 20), end - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match="AV-"):
            with open_tensors(cut):
                pass


def test_without_the_package_it_says_what_to_install(every_type, monkeypatch):
    import sys  # noqa: PLC0415

    for name in [name for name in sys.modules if name.startswith("ascend_runtime.checkpoints.formats.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="package gguf"):
        with open_tensors(every_type[0]):
            pass
