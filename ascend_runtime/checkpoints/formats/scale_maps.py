"""Reads the pair of files in which HunyuanVideo's authors publish weights in fp8: NAME_fp8.pt holds the weights,
NAME_fp8_map.pt one scale for each layer, by its name (Tencent-Hunyuan/HunyuanVideo,
hyvideo/modules/fp8_optimization.py).

The two appear as one file in the older of ComfyUI's forms (see checkpoints.codings.fp8).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ...errors import coded_error
from ..states import scale_map_of
from .parts import Slices
from .torch_file import TorchFile

MARK, SCALE = "scaled_fp8", ".scale_weight"


class ScaledTorchFile:
    """See tensor_file.TensorFile. Raises ValueError if the scales are missing."""

    def __init__(self, path: Path):
        self.path = path
        self.header: dict[str, str] = {}
        self._scales = scale_map_of(path)
        if not self._scales.is_file():
            raise coded_error(
                "AV-1307",
                f"{path} has the name of HunyuanVideo's fp8 weights, whose scales are in {self._scales.name}. Put it "
                "next to them; if these are other weights, give them another name.",
            )

    def __enter__(self) -> ScaledTorchFile:
        with ExitStack() as stack:
            self._weights = stack.enter_context(TorchFile(self.path))
            scales = stack.enter_context(TorchFile(self._scales))
            if wrong := [name for name, shape in scales.shapes.items() if torch.Size(shape).numel() != 1]:
                raise coded_error(
                    "AV-1408", f"{self._scales} holds {wrong[0]}, which is not one number. Download it again."
                )
            self._layers = {f"{layer}{SCALE}": (scales, layer) for layer in scales.shapes}
            self.shapes = {
                **self._weights.shapes, **{name: file.shapes[layer] for name, (file, layer) in self._layers.items()},
                MARK: (0,),
            }  # fmt: skip
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def _place(self, name: str) -> tuple[TorchFile, str]:
        return self._layers.get(name, (self._weights, name))

    def dtype(self, name: str) -> torch.dtype:
        file, own = self._place(name)
        return torch.float8_e4m3fn if name == MARK else file.dtype(own)

    def read(self, name: str, part: Slices | None = None, into: Tensor | None = None) -> Tensor:
        file, own = self._place(name)
        return file.read(own, part, into)

    def in_rows(self, name: str) -> bool:
        file, own = self._place(name)
        return file.in_rows(own)

    def mapped(self, name: str, part: Slices | None = None) -> Tensor:
        file, own = self._place(name)
        return file.mapped(own, part)
