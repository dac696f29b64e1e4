"""What the pack's workflows need: their names in ComfyUI's template browser, and nodes that make them short."""

from .few_steps import FewStepLora
from .served import serve
from .video_size import VideoSize

NODES = [VideoSize, FewStepLora]
__all__ = ["NODES", "serve"]
