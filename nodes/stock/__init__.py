"""Core ComfyUI's MODEL, CLIP and VAE, whose work the ranks do: for stock graphs."""

from .clip import CLIPLoader, DualCLIPLoader
from .vae import VAELoader

NODES = (CLIPLoader, DualCLIPLoader, VAELoader)
