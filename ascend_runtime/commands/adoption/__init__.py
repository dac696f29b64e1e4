"""Swaps the loaders of a stock ComfyUI graph for those whose work the ranks do, and back."""
