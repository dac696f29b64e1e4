"""The loaded networks of a rank: built on the meta device from their config, filled from disk, kept until replaced."""

from .diffusion_model import DiffusionModel
from .slots import Components
from .text_encoder import TextEncoders

__all__ = ["Components", "DiffusionModel", "TextEncoders"]
