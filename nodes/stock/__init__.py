"""Core ComfyUI's MODEL, CLIP and VAE, whose work the ranks do: for stock graphs."""

from .acceleration import ApplyAcceleration
from .model import UNETLoader

NODES = (UNETLoader, ApplyAcceleration)
