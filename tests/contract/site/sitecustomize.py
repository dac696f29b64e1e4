"""Run by each Python that starts with this folder on its PYTHONPATH: a rank whose NPU operators compute on its CPU.

CONTRACT_WITHOUT   a package that this process is not to find, as if it were not installed
CONTRACT_CALLS     a file that gets a line for each call of an operator
CONTRACT_CARD      a file with the card that it plays, "a2", "a3" or "a5", read in each job; else an unknown one
"""

import os
import sys
from pathlib import Path

if missing := os.environ.get("CONTRACT_WITHOUT"):
    sys.modules[missing] = None  # find_spec answers None, an import fails
else:
    import mindiesd  # noqa: F401  # its operators are declared when it is imported

import cpu_kernels
import torch_npu  # noqa: F401

played = lambda: None  # noqa: E731
if file := os.environ.get("CONTRACT_CARD"):
    from ascend_runtime.hardware import devices
    from ascend_runtime.ops import ascend

    played = Path(file).read_text
    devices.card = lambda device: played()
    ascend._communicator = lambda group: group.group_name  # HCCL's name of a group, which Gloo has not
cpu_kernels.register(cpu_kernels.note_in(os.environ["CONTRACT_CALLS"]), played)
