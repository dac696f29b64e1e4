"""Reads .safetensors files (https://huggingface.co/docs/safetensors, "Format")."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import coded_error
from ..bounded import parse_json
from ..faults import shown
from .parts import Slices, Stored, read_stored

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


MAX_HEADER_BYTES = 16 * 2**20  # a 14B model's header in 8 bits has 0.5 MB, that of a file with all components 1 MB
MAX_HEADER_OBJECTS = 200_000  # one for each tensor, and those of training metadata, as JSON within a string


def check_header(path: Path) -> None:
    """Raises ValueError for a header that is too large, before the library parses it."""
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise coded_error(
                "AV-1312", f"{path} has a header of {length} bytes; a model's file has at most {MAX_HEADER_BYTES}."
            )
        objects = file.read(length).count(b"{")
    if objects > MAX_HEADER_OBJECTS:
        raise coded_error(
            "AV-1312", f"{path} has a header of {objects} entries; a model's file has at most {MAX_HEADER_OBJECTS}."
        )


class SafetensorsFile:
    """See tensor_file.TensorFile. The library opens the file first, to check that it is complete."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> SafetensorsFile:
        check_header(self.path)
        try:
            self._library = safe_open(self.path, framework="pt").__enter__()
        except SafetensorError as error:
            why = shown(error)
            raise coded_error(
                "AV-1302", f"{self.path} is not a complete .safetensors file ({why}). Download it again."
            ) from None
        except RuntimeError as error:  # from mmap
            raise coded_error(
                "AV-1209", f"{self.path} cannot be mapped ({shown(error)}). Is there enough address space?"
            ) from None
        self._file = self.path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        self._entries, self._data = parse_json(self._file.read(length)), 8 + length
        self.header = self._entries.pop("__metadata__", None) or {}
        self.shapes = self.stored_shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        self._library.__exit__(*error)

    def dtype(self, name: str) -> torch.dtype:
        held = self._entries[name]["dtype"]
        if held not in SAFETENSORS_DTYPES:
            raise coded_error(
                "AV-1305", f"{self.path} holds {name} as {held}. Use the file's fp32, fp16, bf16 or fp8 form."
            )
        return SAFETENSORS_DTYPES[held]

    def read(self, name: str, part: Slices | None = None, into: Tensor | None = None) -> Tensor:
        start = self._data + self._entries[name]["data_offsets"][0]
        return read_stored(self._file, Stored(start, self.stored_shapes[name], self.dtype(name)), part, into)

    def in_rows(self, name: str) -> bool:
        return True

    def mapped(self, name: str, part: Slices | None = None) -> Tensor:
        tensor = self._library.get_tensor(name)
        return tensor if part is None else tensor[part]
