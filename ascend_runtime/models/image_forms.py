"""How images condition the models of a family, for the node that prepares them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ImageForm:
    """One way in which known frames condition a model.

    in_latent: they replace those of the start latent, marked by 0 in its noise mask. Else they go into the
        conditioning, as `concat_latent_image` and `concat_mask`, which is 0 where the video is known.
    whole: whether `concat_latent_image` is the latent of a whole video, grey where it is unknown, and `concat_mask` has
        a channel for each frame of a latent frame. Else they hold the known latent frames, and one channel.
    takes_more: whether the last frames can be known too, and some of the models read CLIP's states of the images.
    numbers: what else the conditioning has for them.
    models: their names in errors.
    """

    in_latent: bool = False
    whole: bool = True
    takes_more: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)
    models: str = "this model"
