"""Records steps of a job with the device's profiler, in the formats of common trace viewers."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..errors import coded_error
from ..ops.libraries import torch_npu
from ..specs import ProfileSpec


class Recorder:
    """Records the steps that `spec` selects, if it selects this rank; otherwise does nothing.

    The recording is written after its last step, while the other ranks wait. If a recorded step is cancelled or fails,
    the recording is discarded. Raises ValueError if its folder cannot be written to.
    """

    def __init__(self, spec: ProfileSpec | None, device: torch.device, rank: int):
        self._steps = range(0)
        self._device = device
        self._profiler: Any = None
        self._failed = False
        self._spec = spec
        if spec is not None and spec.rank == rank:
            _require_writable(spec.folder)
            now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")[:-3]
            self._folder = os.path.join(spec.folder, f"{now}_rank{rank}")
            self._worker = f"rank{rank}"
            self._steps = range(spec.first_step, spec.last_step + 1)

    def end_with(self, steps: int) -> None:
        """Limits the recording to a job with `steps` steps. Raises ValueError if none of them would be recorded."""
        if self._spec is not None:
            last = self._spec.within(steps, self._spec.rank + 1).last_step
            self._steps = self._steps[: max(0, last + 1 - self._spec.first_step)]

    @property
    def info(self) -> dict[str, str]:
        """`profile`: the folder of the recording, after it has been written."""
        written = len(self._steps) and os.path.isdir(self._folder) and os.listdir(self._folder)
        return {"profile": self._folder} if written else {}

    @contextmanager
    def step(self, number: int):
        """The context of step `number`, counted from 1. Steps must come in order, up to the last recorded one."""
        if number not in self._steps:
            yield
            return
        if self._profiler is None:
            self._start()
        try:
            with record_function(f"step {number}"):
                yield
        except BaseException:
            self._failed = True
            self._stop()
            raise
        self._profiler.step()
        if number == self._steps[-1]:
            self._stop()

    def _start(self) -> None:
        module, options = _npu_profiler() if self._device.type == "npu" else _torch_profiler(self._device)
        write = module.tensorboard_trace_handler(self._folder, self._worker)
        self._profiler = module.profile(
            schedule=module.schedule(wait=0, warmup=0, active=len(self._steps), repeat=1),  # viewers show its steps
            on_trace_ready=lambda profiler: None if self._failed else write(profiler),
            record_shapes=True,
            **options,
        )
        self._profiler.start()

    def _stop(self) -> None:
        self._profiler.stop()
        self._profiler = None  # frees its records, which are large
        if self._failed and os.path.isdir(self._folder):
            shutil.rmtree(self._folder)


def _torch_profiler(device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The module, and options for its `profile`. Writes Chrome traces for TensorBoard and Perfetto."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return torch.profiler, {"activities": activities}


def _npu_profiler() -> tuple[Any, dict[str, Any]]:
    """The same for torch_npu. Writes a folder NAME_ascend_pt for MindStudio Insight, with a Chrome trace in it.

    Level 1 records CANN calls and communication besides the operators.
    """
    module = torch_npu().profiler
    details = module._ExperimentalConfig(
        profiler_level=module.ProfilerLevel.Level1,
        aic_metrics=module.AiCMetrics.PipeUtilization,
        export_type=[module.ExportType.Text, module.ExportType.Db],
    )
    activities = [module.ProfilerActivity.CPU, module.ProfilerActivity.NPU]
    return module, {"activities": activities, "experimental_config": details}


def _require_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise coded_error(
            "AV-1314", f"{folder} cannot be created for recordings: {error.strerror}. Give another folder."
        ) from None
    if not os.access(folder, os.W_OK):
        raise coded_error(
            "AV-1314", f"{folder} is not writable for recordings. Give another folder, or change its permissions."
        )
