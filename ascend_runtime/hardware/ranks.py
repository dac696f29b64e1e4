"""The environment variables that the ranks of one host have in common, whoever starts them. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping

from . import cores
from .environment import HEAP


def variables_of_ranks(
    kind: str, ranks: int, environment: Mapping[str, str], chosen: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    """All variables of `ranks` ranks on a host, but those that differ between ranks.

    kind: of their devices. environment: from `environment.rank_environment`. chosen: by whoever starts the ranks, such
    as network interfaces. own: what overrides all other variables.

    Raises ValueError if OMP_NUM_THREADS is not valid.
    """
    return {
        # Waiting threads must not use the cores that ComfyUI and other ranks need: on two busy cores, a decode
        # took 1.2 s with this setting, and 3.9 s with spinning threads.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        **(HEAP if kind == "cpu" else {}),
        **environment,
        **cores.thread_variables(ranks, environment),
        **chosen,
        **({"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"} if kind == "npu" else {}),  # ComfyUI may have disabled it
        **{name: value for name, value in own.items() if value},
    }
