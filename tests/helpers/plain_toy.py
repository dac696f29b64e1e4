"""What a Toy computes, written out: without blocks, ranks, tiles or passes, on the weights of `toy_family.files`."""

import math

import toy_family
import torch
import torch.nn.functional as F
from ascend_runtime.models.family import TEXT_ENCODER
from toy_family import TEXT_ENCODER_2, files


class Weights(dict):
    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])


def prompt(text):
    """The words' embeddings [1, n, 24] and the pooled vector [1, 12]."""
    words, pieces = (Weights(files.random_weights(part)) for part in (TEXT_ENCODER, TEXT_ENCODER_2))
    text = text.lower()
    x = words["words.weight"][[files.WORDS.index(word) for word in [*text.split(), "</s>"]]]
    for layer in ("layers.0", "layers.1"):
        before = torch.stack([x[: number + 1].mean(0) for number in range(len(x))])
        x = x + torch.tanh(words.linear(layer, torch.cat([x, before], 1)))
    pairs = [text[at : at + 2] for at in range(0, min(16, len(text)), 2)]
    ids = [sum(ord(one) * 31**place for place, one in enumerate(pair)) % 50 for pair in pairs]
    return x[None], pieces.linear("projection", torch.tanh(pieces["pieces.weight"][ids].sum(0)))[None]


def velocity(weights, latent, timestep, text, pooled):
    """[1, C, T, H, W]"""
    w, width, heads = weights, 32, 4
    _, channels, frames, height, width_of_latent = latent.shape
    rows, columns = height // 2, width_of_latent // 2
    x = F.conv3d(latent, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
    x = torch.cat([x.flatten(2).mT, w.linear("condition_embedder.txt", text)], 1)[0]  # [S, D]
    video = frames * rows * columns
    waves = timestep * 0.5 ** torch.arange(16)
    vector = w.linear("condition_embedder.time", torch.cat([waves.cos(), waves.sin()]))
    vector = F.silu(vector + w.linear("condition_embedder.vector", pooled[0]))
    place = [(t, y, x, 0.3 * t) for t in range(frames) for y in range(rows) for x in range(columns)]
    turn = torch.tensor(place + [(0.0,) * 4] * (len(x) - video))[:, None]  # [S, 1, pairs]

    def normed(x, shift, scale):
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(-2)

    def attended(parts):  # of (name, normed tokens): joint, each with weights of its own
        q, k, v = (torch.cat([w.linear(f"{name}.{layer}", x) for name, x in parts]).unflatten(1, (heads, -1))
                   for layer in ("to_q", "to_k", "to_v"))  # fmt: skip
        scales = [[w[f"{name}.norm_{kind}.weight"].expand(len(x), 1, -1) for name, x in parts] for kind in "qk"]
        q, k = (turned(F.rms_norm(x, (8,), eps=1e-6) * torch.cat(scale)) for x, scale in zip((q, k), scales))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(8)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        outs = out.split([len(x) for _, x in parts])
        return torch.cat([w.linear(f"{name}.to_out", x) for (name, _), x in zip(parts, outs)])

    def fed(name, x):
        return w.linear(f"{name}.narrow", F.gelu(w.linear(f"{name}.widen", x), approximate="tanh"))

    for number in range(2):
        names = [f"double_blocks.{number}.{stream}" for stream in ("video", "text")]
        mods = [w.linear(f"{name}.mod", vector).chunk(6) for name in names]
        parts = x.split([video, len(x) - video])
        made = attended([(name, normed(x, *mod[:2])) for name, x, mod in zip(names, parts, mods)])
        parts = [x + update * mod[2] for x, update, mod in zip(parts, made.split([video, len(x) - video]), mods)]
        x = torch.cat([x + fed(name, normed(x, *mod[3:5])) * mod[5] for name, x, mod in zip(names, parts, mods)])
    for number in range(3):
        name = f"single_blocks.{number}"
        shift, scale, gate = w.linear(f"{name}.mod", vector).chunk(3)
        seen = normed(x, shift, scale)
        x = x + gate * (attended([(name, seen)]) + fed(name, seen))
    shift, scale = w.linear("norm_out.linear", vector).chunk(2)
    patches = w.linear("proj_out", normed(x[:video], shift, scale)).view(frames, rows, columns, channels, 2, 2)
    return patches.permute(3, 0, 1, 4, 2, 5).reshape(latent.shape)


def sampled(weights, prompts, shape, steps, seed, scale=3.0, shift=2.0):
    """Euler's steps along u + s(c - u), and the latent as VAEs take it. prompts: text and pooled vector, of both."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    squares = [(1 - step / steps) ** 2 for step in range(steps + 1)]
    sigmas = [shift * square / (1 + (shift - 1) * square) for square in squares]
    for sigma, following in zip(sigmas, sigmas[1:]):
        cond, uncond = (velocity(weights, x, 1000 * sigma, *prompt) for prompt in prompts)
        x = x + (following - sigma) * (uncond + scale * (cond - uncond))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (toy_family.MEAN, toy_family.STD))
    return x * std + mean


def whole_conv(x, weights, name, edges=(1, 1, 1, 1), stride=1):
    x = F.pad(torch.cat([x[:, :1]] * 2 + [x], 1)[None], (*edges, 0, 0), mode="replicate")
    return F.conv3d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=(1, stride, stride))[0]


def activated(x, weights, name):
    return F.silu(F.group_norm(x[None], 4, weights[f"{name}.weight"], weights[f"{name}.bias"])[0])


def decoded(weights, latent):
    """[C, T, h, w] -> frames [T, H, W, 3] in 0..1"""
    w = {name.removeprefix("decoder."): tensor for name, tensor in weights.items()}
    x = activated(whole_conv(latent, w, "conv_in"), w, "norm")
    x = activated(whole_conv(F.interpolate(x, scale_factor=(2, 2)), w, "conv"), w, "norm_out")
    frames = F.pixel_shuffle(whole_conv(x, w, "conv_out").movedim(1, 0), 4)  # [T, 12, H, W]
    frames = frames.unflatten(1, (3, 4)).transpose(1, 2).flatten(0, 1)[3:]
    return frames.movedim(1, -1).clamp(-1, 1) / 2 + 0.5


def encoded(weights, frames):
    """[T, H, W, 3] in 0..1 -> [C, T, h, w]"""
    w = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    x = torch.cat([frames[:1]] * 3 + [frames]).movedim(-1, 1) * 2 - 1
    x = x.unflatten(0, (-1, 4)).transpose(1, 2).flatten(1, 2)  # [T, 12, H, W]
    x = F.conv3d(F.pixel_unshuffle(x, 4).movedim(0, 1), w["fold.weight"], w["fold.bias"])
    return whole_conv(activated(whole_conv(x, w, "conv", (1, 0, 1, 0), 2), w, "norm"), w, "conv_out")[:16]
