"""What stands in ComfyUI for a network whose weights are in the ranks."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher

CPU = torch.device("cpu")


class RemoteWeights(torch.nn.Module):
    """A network without parameters: the ranks hold them.

    what: its name in errors, such as "The VAE".
    """

    def __init__(self, what: str):
        torch.nn.Module.__init__(self)  # not that of a class of core's, which would build a network
        self.what = what

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(no_such(self.__dict__.get("what", "The network"), name)) from None


class RemotePatcher(ModelPatcher):
    """A patcher of weights that are in the ranks. Refuses what would read or change them.

    It counts as one byte on the CPU: on another device, ComfyUI would free memory before each use, of the ranks too.
    """

    @classmethod
    def of(cls, network: torch.nn.Module) -> RemotePatcher:
        return cls(network, load_device=CPU, offload_device=CPU, size=1)

    def get_key_patches(self, filter_prefix=None):
        raise ValueError(in_ranks(self.model.what, "merged"))

    def model_state_dict_for_saving(self, *args, **kwargs):
        raise ValueError(in_ranks(self.model.what, "saved"))

    def deepclone_multigpu(self, *args, **kwargs):
        raise RuntimeError(  # core's nodes take this type of error for "not possible", and log it
            f"{self.model.what} runs on the ranks, so core cannot move it to a device. Ascend Parallel Config chooses "
            "the cards."
        )


def in_ranks(what: str, done: str) -> str:
    """The error for a node that needs the weights. done: what it does with them, such as "saved"."""
    return (
        f"{what} cannot be {done} here, as the weights are in the ranks. Connect this node to core's own loader of the "
        "same file, or remove it."
    )


def no_such(what: str, name: str) -> str:
    """The error for an attribute that a node reads and that is not there."""
    return (
        f"{what} has no {name!r} here, as the ranks do the work and hold the weights. A node that needs it works with "
        "core's own loader of the same file only."
    )
