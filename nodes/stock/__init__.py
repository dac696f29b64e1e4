"""Core ComfyUI's MODEL, CLIP and VAE, whose work the ranks do: for stock graphs."""

from .vae import VAELoader

NODES = (VAELoader,)
