"""Core ComfyUI's MODEL, CLIP and VAE, whose work the ranks do: for stock graphs."""

from .acceleration import ApplyAcceleration
from .checkpoint import CheckpointLoader
from .clip import CLIPLoader, DualCLIPLoader
from .model import UNETLoader
from .vae import VAELoader

NODES = (UNETLoader, CLIPLoader, DualCLIPLoader, VAELoader, CheckpointLoader, ApplyAcceleration)
