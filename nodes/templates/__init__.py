"""What the pack's workflows need: their names in ComfyUI's template browser."""

from .served import serve

__all__ = ["serve"]
