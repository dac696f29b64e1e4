"""HunyuanVideo's VAE in tiles a quarter as large as published, for which small videos are large."""

from ascend_runtime.models.hunyuan_video.vae import video_vae
from ascend_runtime.models.shared.overlapping import Cut

SIZES = {"TIME": Cut(5, 3, dropped=1), "SPACE": Cut(8, 6), "LONGEST": 4}  # of latents
DIFFUSERS = (64, 64, 16, 48, 48, 12)  # for its enable_tiling
PUBLISHED = (256, 256, 64, 192, 192, 48)


def use(put=setattr):
    for name, size in SIZES.items():
        put(video_vae, name, size)
