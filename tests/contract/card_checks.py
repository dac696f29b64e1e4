"""Holds what is called on "npu" tensors to the rules of a card: operators of torch_npu and MindIE SD, torch's own that
have a row in card_rules.py, and collectives. For fake tensors, over which nothing computes."""

from collections import Counter

import operator_rules
import torch
from ascend_runtime.ops import card_rules
from operator_rules import FORBIDDEN
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# c10d's operators -> the names of torch.distributed's functions
EXCHANGES = {
    "allreduce_": "all_reduce", "alltoall_base_": "all_to_all_single", "_allgather_base_": "all_gather_into_tensor",
    "send": "isend", "recv_": "irecv",
}  # fmt: skip

CAST = "_npu_dtype_cast"  # what torch_npu for CANN 8.5 makes of a tensor's `to`, instead of aten's _to_copy


class CardChecks(TorchDispatchMode):
    """Raises AssertionError or ValueError at a call that the rules of `card` forbid, or for which there is no rule.

    checked: how often each operator and HCCL primitive with a rule was called.
    """

    def __init__(self, card):
        super().__init__()
        self.card = card
        self.checked = Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "npu" for tensor in tensors):
            namespace, name = operator.name().partition(".")[0].split("::")
            if namespace in ("npu", "mindiesd") and name != CAST:
                self._check_fused(name, operator_rules.by_schema(operator._schema, arguments, keywords))
            elif namespace == "c10d":
                self._check_exchange(name, tensors)
            elif namespace == "aten":
                self._check_torchs(name, tensors)
        return operator(*arguments, **keywords)

    def _check_fused(self, name, values):
        # torch_npu makes it of scaled_dot_product_attention by the SoC of this process, which is not a played 950.
        if self.card == "a5" and name == "npu_fusion_attention_v3":
            name = "npu_fusion_attention"
            card_rules.require_operator(self.card, name, values["query"].dtype, FORBIDDEN)
        else:
            operator_rules.check(name, values, self.card)
        self.checked[name] += 1

    def _check_exchange(self, name, tensors):
        assert name in EXCHANGES, f"{name} has no name in EXCHANGES"
        primitive = card_rules.COLLECTIVES[EXCHANGES[name]]
        for tensor in tensors:
            allowed = card_rules.HCCL[primitive][self.card].dtypes
            assert tensor.dtype in allowed, f"{primitive} does not take {tensor.dtype} on {self.card}"
        self.checked[primitive] += 1

    def _check_torchs(self, name, tensors):
        name = name.removesuffix("_")  # in place
        strict = name == "convolution" and not torch.npu.conv.allow_hf32
        name = "convolution_without_hf32" if strict else name
        if name in card_rules.TORCH:
            card_rules.require_operator(self.card, name, tensors[0].dtype, FORBIDDEN)
            self.checked[name] += 1
