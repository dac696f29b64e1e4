"""What the ranks did for a video, written into its file next to ComfyUI's own metadata."""

from . import kept
from .written import serve

__all__ = ["kept", "serve"]
