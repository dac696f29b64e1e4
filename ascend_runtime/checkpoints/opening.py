"""Opens tensor files, recognised by their content: .safetensors, GGUF, torch.save, torch's distributed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import coded_error
from .bounded import check_tensors
from .codings.recognised import logical_shapes
from .faults import not_readable
from .formats.dcp import METADATA, DistributedCheckpoint
from .formats.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from .formats.scale_maps import ScaledTorchFile
from .formats.tensor_file import TensorFile
from .formats.torch_file import TorchFile
from .states import has_scale_map

# The first bytes of torch.save and GGUF files. A .safetensors file starts with its header's length.
ZIP, OLD_PICKLE, GGUF = b"PK\x03\x04", b"\x80\x02\x8a\x0a", b"GGUF"
# The first bytes of files that are often mistaken for weights, and their errors.
PAGE = (
    "AV-1304",
    "a web page, as a download without access rights returns. Log in where it is published, and download it again",
)
POINTER = (
    "AV-1303",
    "a Git LFS pointer instead of the weights. Run `git lfs pull` in its folder, or download the file itself",
)
OTHER_STARTS = {b"version https://git-lfs": POINTER, b"<!doctype": PAGE, b"<html": PAGE, b"<?xml": PAGE}


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Opens a file, or the folder of a distributed checkpoint. Raises ValueError if it has another format, is cut off
    or not readable, or has invalid tensor names or shapes (see bounded.py)."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(_kind(path)(path))
        except OSError as error:
            raise not_readable(path, error) from None
        check_tensors(path, file.shapes)
        file.stored_shapes = file.shapes
        file.shapes = file.shapes | logical_shapes(file)
        yield file


def _gguf(path: Path) -> type[TensorFile]:
    """The gguf package is imported for files that need it only."""
    try:
        from .formats.gguf_file import GgufFile
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise coded_error(
            "AV-1305",
            f"{path} is a GGUF file, for which this Python lacks the package gguf. Install what the pack needs: "
            "pip install -r requirements.txt in its folder.",
        ) from None
    return GgufFile


def _kind(path: Path) -> type[TensorFile]:
    if path.is_dir():
        if not (path / METADATA).is_file():
            raise coded_error(
                "AV-1306", f"{path} is a folder without {METADATA}, so not a torch distributed checkpoint."
            )
        return DistributedCheckpoint
    if not path.is_file():
        why = "is not a regular file" if path.exists() else "does not exist"
        raise coded_error("AV-1301", f"{path} {why}. Put the weights there.")
    if path.stat().st_size == 0:
        raise coded_error("AV-1302", f"{path} is empty (0 bytes). Download it again.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(GGUF):
        return _gguf(path)
    if start.startswith(OLD_PICKLE):
        raise coded_error(
            "AV-1305",
            f"{path} was written by torch before 1.6. Save it again: "
            "torch.save(torch.load(path, weights_only=True), path).",
        )
    other = next((what for begin, what in OTHER_STARTS.items() if start.lstrip().lower().startswith(begin)), None)
    if other is not None:
        code, what = other
        raise coded_error(code, f"{path} is {what}.")
    if start.startswith(ZIP):
        return ScaledTorchFile if has_scale_map(path) else TorchFile
    if int.from_bytes(start[:8], "little") > MAX_HEADER_BYTES:
        raise coded_error(
            "AV-1306",
            f"{path} is neither a .safetensors nor a torch.save file, or its beginning is damaged. Give the file "
            "that holds the weights, or its folder; if it is this file, download it again.",
        )
    return SafetensorsFile
