"""The networks that a rank holds: built on the meta device from a config, loaded from disk, kept until replaced."""

from .diffusion_model import DiffusionModel
from .room import HostMemory
from .slots import Components
from .text_encoder import TextEncoders

__all__ = ["Components", "DiffusionModel", "HostMemory", "TextEncoders"]
