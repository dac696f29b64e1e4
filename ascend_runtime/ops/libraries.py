"""The only import of torch_npu and mindiesd: on first use, so that no machine without an NPU needs them."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

logger = logging.getLogger(__name__)


@lru_cache(maxsize=None)
def torch_npu() -> ModuleType:
    """torch_npu, whose operators every NPU has."""
    import torch_npu

    return torch_npu


@lru_cache(maxsize=None)
def mindiesd() -> ModuleType | None:
    """MindIE SD, or None where it is not there: torch_npu's operators serve then, and the log says so once."""
    if find_spec("mindiesd") is None:
        logger.info("mindiesd is not installed: torch_npu's operators serve alone (no laser, no fastest attention).")
        return None
    try:
        import mindiesd
    except Exception as error:  # it loads binaries that fit one torch and one CANN
        logger.warning("mindiesd cannot be imported (%s): torch_npu's operators serve alone.", error)
        return None
    return mindiesd
