"""The Toy's VAE: replicated borders, norms over the whole video, all frames at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ascend_runtime.models.shared.group_norm import TiledGroupNorm
from ascend_runtime.models.shared.vae import VideoVae
from ascend_runtime.ops.memory import most_allocated
from ascend_runtime.parallel.tiles import single_tile
from torch import nn

GROUPS, FOLD, TEMPORAL = 4, 4, 4  # pixels and frames that become channels


class Conv(nn.Conv3d):
    """3 frames, of which two are looked back at; 3 x 3 pixels, those beyond the tile's edge its neighbours'. Beyond the
    plane and before the video the nearest is repeated."""

    def __init__(self, into, out, stride=1):
        super().__init__(into, out, 3, (1, stride, stride))
        self.edges = (1, 1, 1, 1) if stride == 1 else (1, 0, 1, 0)

    def forward(self, x, tile):
        left, right, top, bottom = self.edges
        *others, height, width = x.shape
        wide = x.new_empty(*others, top + height + bottom, left + width + right)
        inner = wide[..., top : top + height, left : left + width]
        for place in tile.sent_first(self.edges):
            inner[(..., *place)].copy_(x[(..., *place)])
        arrive = tile.fill_edges(wide, self.edges, replicate=True)
        inner.copy_(x)
        arrive()
        return super().forward(torch.cat([wide[:, :, :1]] * 2 + [wide], 2))


class Decoder(nn.Module):
    def __init__(self, base, channels):
        super().__init__()
        self.conv_in, self.norm = Conv(channels, base), TiledGroupNorm(GROUPS, base)
        self.conv, self.norm_out = Conv(base, base), TiledGroupNorm(GROUPS, base)
        self.conv_out = Conv(base, 3 * FOLD**2 * TEMPORAL)

    def forward(self, x, tile):
        """[B, C, T, h, w] -> [B, 3, 4T-3, 8h, 8w]"""
        x = F.silu(self.norm(self.conv_in(x, tile), tile))
        x = x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
        x = self.conv_out(F.silu(self.norm_out(self.conv(x, tile), tile)), tile)
        x = x.unflatten(1, (3, TEMPORAL, FOLD, FOLD))  # [B, 3, t, p, q, T, h, w]
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, TEMPORAL - 1 :]


class Encoder(nn.Module):
    def __init__(self, base, channels):
        super().__init__()
        self.fold = nn.Conv3d(3 * FOLD**2 * TEMPORAL, base, 1)
        self.conv, self.norm = Conv(base, base, stride=2), TiledGroupNorm(GROUPS, base)
        self.conv_out = Conv(base, 2 * channels)

    def forward(self, x, tile):
        """[B, 3, 4T-3, 8h, 8w] -> mean and logarithm of variance [B, 2C, T, h, w]"""
        x = torch.cat([x[:, :, :1]] * (TEMPORAL - 1) + [x], 2)
        x = x.unflatten(4, (-1, FOLD)).unflatten(3, (-1, FOLD)).unflatten(2, (-1, TEMPORAL))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # [B, 3*t*p*q, T, h, w]
        return self.conv_out(F.silu(self.norm(self.conv(self.fold(x), tile), tile)), tile)


class AutoencoderToy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        with torch.device("meta"):
            self.encoder = Encoder(config["base_dim"], config["z_dim"])
            self.decoder = Decoder(config["base_dim"], config["z_dim"])


class ToyVae(VideoVae):
    def chunks(self, length):
        return [slice(0, length)]

    def decoded(self, latent, tile):
        for chunk in latent:
            yield self.network.decoder(chunk[None], tile)[0].clamp(-1, 1)

    def encoded(self, video, tile):
        for frames in video:
            yield self.network.encoder(frames[None], tile)[0, : self.form.channels]

    def bytes_needed(self, work, frames, height, width, tiles=1):
        """By the longest video's own pass, on the meta device."""
        vae = ToyVae(AutoencoderToy(self.network.config).to(self.dtype), self.form)
        shape = (self.form.channels, frames, height, width)
        if work == "encode":
            shape = (3, TEMPORAL * (frames - 1) + 1, self.form.spatial * height, self.form.spatial * width)
        given = torch.empty(shape, dtype=self.dtype, device="meta")
        made = vae.decoded if work == "decode" else vae.encoded
        return most_allocated(lambda: list(made([given], single_tile(height, width))))
