"""Files are read by several threads in pieces, and all is as if one had read them tensor by tensor."""

import faulthandler
import os
import signal
import threading
import time
from contextlib import closing

import pytest
import torch
from ascend_runtime.checkpoints import pieces
from ascend_runtime.checkpoints.pieces import Wanted, read_in_pieces
from ascend_runtime.checkpoints.opening import open_tensors
from fused_files import save as saved

CPU, SEED = torch.device("cpu"), 5
KINDS = ("safetensors", "torch", "distributed")
PARTS = {"all": None, "rows": lambda shape: (slice(3, 30), slice(0, shape[1])),
         "columns": lambda shape: (slice(0, shape[0]), slice(1, 6)),
         "none": lambda shape: (slice(9, 9), slice(0, shape[1]))}  # fmt: skip


def tensors(dtype=torch.float32, count=30):
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    return {f"{n:02}": torch.randn(40, 8 + n, generator=generator).to(dtype) for n in range(count)}


def wanted(file, dtype, part_of=None, names=None, device=CPU):
    for name in names or file.shapes:
        shape = file.shapes[name]
        yield Wanted(name, name, None, shape, part_of and part_of(shape), dtype, device)


def read(path, dtype, **which):
    with open_tensors(path) as file, closing(read_in_pieces(file, wanted(file, dtype, **which))) as made:
        return dict(made)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Three rows or so each; and whatever happens, no thread is left, and torch computes with as many as before."""
    before, computing = threading.enumerate(), torch.get_num_threads()
    monkeypatch.setattr(pieces, "READ_BYTES", 100)
    yield
    assert threading.enumerate() == before and torch.get_num_threads() == computing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")],
                         ids="-".join)  # fmt: skip
def test_each_tensor_is_what_one_read_gives(tmp_path, kind, part, dtypes):
    held, kept = (getattr(torch, dtype) for dtype in dtypes)
    given = tensors(held)
    made = read(saved(kind, tmp_path / "file", given), kept, part_of=PARTS[part])
    for name, tensor in given.items():
        own = tensor if PARTS[part] is None else tensor[PARTS[part](tensor.shape)]
        assert made[name].dtype == kept and torch.equal(made[name], own.to(kept))


def test_tensors_of_all_shapes_and_of_another_order(tmp_path):
    given = {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "hollow": torch.empty(3, 0),
             "row": torch.arange(90.0), "turned": torch.randn(30, 40).t()}  # fmt: skip
    for kind in ("torch", "distributed"):
        made = read(saved(kind, tmp_path / kind, given), torch.float16)
        for name, tensor in given.items():
            assert torch.equal(made[name], tensor.half()), name


def test_a_card_gets_its_pieces_from_the_thread_that_took_it(tmp_path, monkeypatch):
    """The meta device stands for a card: it takes no value, and a tensor of it is no CPU's."""
    copying, path = [], saved("safetensors", tmp_path / "file", tensors())

    def copy(own, other, call=torch.Tensor.copy_):
        copying.append(threading.current_thread())
        assert other.device == CPU and other.dtype == own.dtype == torch.bfloat16 and own.is_meta
        return call(own, other)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    made = read(path, torch.bfloat16, device=torch.device("meta"))
    assert {name: tensor.shape for name, tensor in made.items()} == {name: x.shape for name, x in tensors().items()}
    assert set(copying) == {threading.current_thread()} and len(copying) > 2 * len(made)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_fault_in_the_given_order_is_told(tmp_path, kind):
    given = tensors()
    given["03"][-1, -1], given["04"][0, 0] = float("nan"), float("inf")
    path = saved(kind, tmp_path / "file", given)
    for names, first in ((["03", "04"], "03"), (["04", "03"], "04"), (["01", "02", "04", "05", "03"], "04")):
        with pytest.raises(ValueError, match=f"NaN or infinite values in {first}. The file is damaged"):
            read(path, torch.float16, names=names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held, kept, value", [("float32", "float16", 1e30), ("float64", "float32", 1e300),
                                               ("float32", "bfloat16", 3.4e38)])  # fmt: skip
def test_what_a_dtype_does_not_hold_is_told(tmp_path, kind, held, kept, value):
    given = tensors(getattr(torch, held), count=3)
    given["01"][-1, 2] = -value
    path = saved(kind, tmp_path / "file", given)
    with pytest.raises(ValueError, match=rf"file has values of up to \S+ in 01, which exceed torch.{kept}"):
        read(path, getattr(torch, kept))
    assert read(path, getattr(torch, held))["01"][-1, 2] == given["01"][-1, 2]


def cut_while_it_is_read(path, dtype, part, came):
    with open_tensors(path) as file, closing(read_in_pieces(file, wanted(file, dtype, part_of=PARTS[part]))) as made:
        for name, _ in made:
            came.append(name)
            os.truncate(path, 1000)


@pytest.mark.parametrize("dtype, part", [(torch.float16, "all"), (torch.float32, "rows")], ids=["converted", "as is"])
def test_a_file_that_becomes_shorter_is_told(tmp_path, dtype, part):
    path, came = saved("torch", tmp_path / "file", tensors(count=60)), []
    with pytest.raises(ValueError, match="became shorter while it was read"):
        cut_while_it_is_read(path, dtype, part, came)
    assert came and came == [*tensors(count=60)][: len(came)]


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_mapped_file_that_becomes_shorter_is_a_signal(tmp_path, kind):
    """Which no process lives to tell of: `host.advise` does."""
    path = saved(kind, tmp_path / "file", tensors(count=60))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            cut_while_it_is_read(path, torch.float32, "all", [])
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_readers_wait_for_who_takes_the_tensors(tmp_path, monkeypatch, dtype):
    """What is read ahead is bounded; and who stops in the middle waits for no more than that."""
    counts = []
    monkeypatch.setattr(os, "preadv", lambda *given, call=os.preadv: counts.append(call(*given)) or counts[-1])
    path, part = saved("safetensors", tmp_path / "file", tensors()), PARTS["rows"]
    most = pieces.PIECES_PER_THREAD * max(pieces.THREADS, torch.get_num_threads())
    with open_tensors(path) as file, closing(read_in_pieces(file, wanted(file, dtype, part_of=part))) as made:
        taken = 0
        for name, tensor in made:
            taken += tensor.numel() * 4
            time.sleep(0.02)
            assert sum(counts) <= taken + most * 200, name  # a piece is a row at least
            if name == "20":
                break
    begun = len(counts)
    time.sleep(0.05)
    assert len(counts) == begun
