"""A .safetensors file (https://huggingface.co/docs/safetensors, "Format")."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .parts import Part, Stored, read_stored

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class SafetensorsFile:
    """See tensor_files.TensorFile. The library opens it first, as it checks that the file is whole."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> SafetensorsFile:
        try:
            self._library = safe_open(self.path, framework="pt").__enter__()
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a whole .safetensors file ({error}). Download it again.") from None
        self._file = self.path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        entries = json.loads(self._file.read(length))
        self.header = entries.pop("__metadata__", None) or {}
        self._entries, self._data = entries, 8 + length
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._library.__exit__(*error)

    def dtype(self, name: str) -> torch.dtype:
        held = self._entries[name]["dtype"]
        if held not in DTYPES:
            raise ValueError(f"{self.path} holds {name} as {held}. Take its fp32, fp16, bf16 or fp8 form.")
        return DTYPES[held]

    def read(self, name: str, part: Part | None = None, into: Tensor | None = None) -> Tensor:
        start = self._data + self._entries[name]["data_offsets"][0]
        return read_stored(self._file, Stored(start, self.shapes[name], self.dtype(name)), part, into)

    def in_rows(self, name: str) -> bool:
        return True

    def mapped(self, name: str) -> Tensor:
        return self._library.get_tensor(name)
