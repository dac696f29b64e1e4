"""Reads weights in the blocks of GGUF files."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import coded_error
from ..formats.parts import Slices
from ..formats.tensor_file import TensorFile
from .coding import Codings


@dataclass(frozen=True)
class BlockCoding:
    """The coding (see coding.py) of a weight in ggml's blocks. kind: their type, as ggml names it. reshaped: whether it
    was stored as a matrix of another shape, which is read whole."""

    kind: str
    grain: int
    bits: float
    reshaped: bool = False
    keys = ()

    def numbers(self, file: TensorFile, key: str, part: Slices) -> Tensor:
        import gguf

        raw = file.read(key, None if self.reshaped else part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numbers that are not finite are reported by name
            made = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[self.kind])
        made = torch.from_numpy(np.ascontiguousarray(made))
        return made.view(file.shapes[key])[part] if self.reshaped else made


def block_codings(file: TensorFile) -> Codings | None:
    """How the weights of a GGUF file are stored; None: it is no GGUF file. Raises ValueError for types that the gguf
    package does not dequantize."""
    kinds: dict[str, str] | None = getattr(file, "kinds", None)
    if kinds is None:
        return None
    import gguf

    made = {}
    for kind in sorted(set(kinds.values())):
        own = gguf.GGMLQuantizationType[kind]
        values, nbytes = gguf.GGML_QUANT_SIZES[own]
        try:
            gguf.dequantize(np.zeros((1, nbytes), np.uint8), own)
        except NotImplementedError:
            raise coded_error(
                "AV-1305",
                f"{file.path} holds tensors in {kind}, which the package gguf does not dequantize. Use the model's "
                "Q8_0, Q4_K or F16 form.",
            ) from None
        made[kind] = BlockCoding(kind, values, 8 * nbytes / values)
    return Codings({name: _of(file, name, made[kind]) for name, kind in kinds.items()}, set())


def _of(file: TensorFile, name: str, coding: BlockCoding) -> BlockCoding:
    return coding if file.in_rows(name) else replace(coding, grain=1, reshaped=True)
