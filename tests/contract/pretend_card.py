"""An NPU that is pretended: tensors on "npu" whose values are in the CPU's memory, and every wait of the host for it.

The package runs on it unchanged and with real values: an operator of a tensor on "npu" computes on the CPU, torch_npu's
and MindIE SD's by their stand-ins (cpu_kernels.py). Where torch_npu would synchronise, `Card` notes it
with its place: a value that the host reads, a shape that depends on values, a copy that is not from or to pinned
memory. (Sources: Ascend/pytorch, torch_npu/csrc/aten/ops/op_api/CopyKernelOpApi.cpp and
torch_npu/csrc/core/npu/CachingHostAllocator.cpp.)

Collectives of HCCL, and waits for their work, are ordered on streams and do not block the host (torch_npu/csrc/
distributed/ProcessGroupHCCL.cpp, without TORCH_HCCL_BLOCKING_WAIT); here a fake group does them.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

PACKAGE = Path(__file__).resolve().parents[2] / "ascend_runtime"
NPU, CPU = torch.device("npu", 0), torch.device("cpu")
# Operators that read a value, or whose output's shape depends on values.
READING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "repeat_interleave", "bincount",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip
COPIES = {"_to_copy", "copy_"}


class Wait(NamedTuple):
    """step: that of `Card.step`. in_block: whether a block of the network was computing."""

    step: int
    in_block: bool
    why: str
    place: str


class OnCard(torch.Tensor):
    """A tensor on "npu". values: on the CPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=NPU
        )

    def __init__(self, values):
        self.values_on_cpu = values

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), keywords=None):
        """Where no mode is: on other threads."""
        return cls.card.__torch_dispatch__(operator, types, arguments, keywords)


class Card(TorchDispatchMode):
    """The context in which tensors on "npu" are pretended. waits: those of the host. step: any number."""

    def __init__(self):
        super().__init__()
        self.waits, self.step, self.in_block = [], 0, False
        self._pinned = []
        OnCard.card = self  # of the process: the last one

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        name, given = operator.name().partition("::")[2].partition(".")[0], tree_leaves((arguments, keywords))
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        assert all(isinstance(x, OnCard) or x.device.type in ("cpu", "meta") for x in tensors), f"{operator}: {tensors}"
        if name == "is_pinned":
            return self._is_pinned(arguments[0])
        if name == "_pin_memory":
            self._pinned.append(arguments[0].clone())
            return self._pinned[-1]
        keywords = dict(keywords or {})
        before = any(isinstance(x, OnCard) for x in tensors)
        device = keywords.get("device")
        after = before if device is None else torch.device(device).type == "npu"
        if name in COPIES:
            self._copy(name, arguments, keywords, after)
        elif before:
            self._operator(name, tensors)
        if device is not None:
            keywords["device"] = CPU if after else device
        pins = keywords.get("pin_memory")
        if pins:
            keywords["pin_memory"] = False
        made = self._computed(operator, arguments, keywords, after)
        if pins:
            self._pinned.append(made)
        return made

    def _computed(self, operator, arguments, keywords, after):
        known = {id(x.values_on_cpu): x for x in tree_leaves((arguments, keywords)) if isinstance(x, OnCard)}
        inside = tree_map(lambda x: x.values_on_cpu if isinstance(x, OnCard) else x, (arguments, keywords))
        made = operator(*inside[0], **inside[1])

        def put(x):  # what writes into a tensor returns it
            return known[id(x)] if id(x) in known else OnCard(x) if after and isinstance(x, torch.Tensor) else x

        return tree_map(put, made)

    def _operator(self, name, tensors):
        mixed = [x for x in tensors if not isinstance(x, OnCard) and x.ndim]
        assert not mixed or name.startswith("set_"), f"{name} of tensors on the card and on the CPU"
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        if name in READING or by_mask:
            self._note(f"{name} of {list(tensors[0].shape)}")

    def _copy(self, name, arguments, keywords, after):
        if name == "_to_copy":
            source, blocking = arguments[0], not keywords.get("non_blocking", False)
            there = after
        else:
            source = arguments[1]
            blocking = not (arguments[2] if len(arguments) > 2 else keywords.get("non_blocking", False))
            there = isinstance(arguments[0], OnCard)
        if isinstance(source, OnCard) and not there:
            self._note(f"{list(source.shape)} to the host")
        elif there and not isinstance(source, OnCard) and (blocking or not self._is_pinned(source)):
            self._note(f"{list(source.shape)} from the host, {'blocking' if blocking else 'not pinned'}")

    def _is_pinned(self, tensor):
        return tensor.untyped_storage()._cdata in {x.untyped_storage()._cdata for x in self._pinned}

    def synchronise(self, *_):
        """In the place of torch.npu.synchronize."""
        self._note("synchronize")

    def _note(self, why):
        self.waits.append(Wait(self.step, self.in_block, why, _place()))

    def watch(self, network):
        """Has the blocks of a network say when they compute."""
        for block in network.blocks:
            block.register_forward_pre_hook(lambda *_: setattr(self, "in_block", True))
            block.register_forward_hook(lambda *_: setattr(self, "in_block", False))


def _place():
    """The innermost line of the package."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"
