"""Imports torch_npu and mindiesd on first use, so that machines without an NPU do not need them."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

from ..hardware import host

logger = logging.getLogger(__name__)


@lru_cache(maxsize=None)
def torch_npu() -> ModuleType:
    """torch_npu, which every NPU needs."""
    import torch_npu

    return torch_npu


@lru_cache(maxsize=None)
def mindiesd() -> ModuleType | None:
    """MindIE SD, or None if it is not installed or does not fit; then torch_npu's operators are used, which is logged
    once."""
    if find_spec("mindiesd") is None:
        logger.info("mindiesd is not installed: only torch_npu's operators are used (no laser or fastest attention).")
        return None
    if fault := host.mindiesd_fault():
        logger.warning("%s", fault)
        return None
    try:
        import mindiesd
    except Exception as error:  # it loads binaries built for one version of torch and CANN
        logger.warning("mindiesd cannot be imported (%s): only torch_npu's operators are used.", error)
        return None
    return mindiesd
