"""A rank in whose memory numbers go wrong, for a test: `main()` by gloo_ranks, in FOLDER, which holds a checkpoint with
two experts ("model"). The rank writes to guard-RANKS-RANK.json what each
case says ({name: [kind of error, text], or the warnings}), and the operators of steps with the guard and without.

Whatever went wrong is taken back, and then the job's latent must be that of the first job, to the bit.
"""

import json
from collections import Counter
from contextlib import contextmanager

import gloo_ranks
import torch
import torch.distributed as dist
from ascend_runtime import (
    AccelerationSpec, BlockCacheSpec, Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec,
    VaeSpec,
)  # fmt: skip
from ascend_runtime.acceleration.block_cache import BlockCache
from ascend_runtime.engine import denoising, video
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.wire import messages
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPE, STEPS, TAKES_BEFORE = (1, 16, 3, 4, 6), 4, 1  # a job asks for a cancel once before its first step
CACHE = AccelerationSpec(block_cache=BlockCacheSpec(interval=2, start=1))
LATENT = (1, 16, 3, 4, 8)  # of a video: 9 frames of 32 x 64 pixels


class Client:
    """A channel to a client that says nothing. after: what happens behind each step, by number."""

    def __init__(self, after=None):
        self._after, self._taken = after or {}, -TAKES_BEFORE

    def take(self):
        self._taken += 1
        self._after.pop(self._taken, lambda: None)()
        return None

    def send(self, message):
        pass


class Counts(TorchDispatchMode):
    """What a rank does in a step: its operators, those that look at a whole latent, and its exchanges."""

    def __init__(self):
        super().__init__()
        self.operators, self.of_latents, self.exchanges = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        name = operator.name().partition(".")[0]
        self.operators[name] += 1
        self.exchanges[name] += operator.namespace in ("c10d", "_c10d_functional")
        sizes = [leaf.shape for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        self.of_latents[name] += torch.Size(SHAPE) in sizes
        return operator(*arguments, **(keywords or {}))


@contextmanager
def swapped(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def spoilt(weight, value=torch.nan, at=None):
    """While a weight has such a value."""
    before = weight.clone()
    weight.view(-1)[at] = value
    try:
        yield
    finally:
        weight.copy_(before)


class Cases:
    def __init__(self, folder, rank, ranks):
        self.pipeline, self.rank, self.ranks = RankPipeline(torch.device("cpu")), rank, ranks
        self.last = rank == ranks - 1
        self.model = DiffusionModelSpec(path=str(folder / "model"))
        self.encoder, self.vae = TextEncoderSpec(path=str(folder / "model")), VaeSpec(path=str(folder / "model"))
        self.said = {}
        self.expected = self.sample().tensor

    def message(self, **changes):
        generator = torch.Generator().manual_seed(4)
        positive, negative = (Conditioning(text=torch.randn(1, 12, 32, generator=generator)) for _ in range(2))
        return messages.Sample(**{
            "job": 1, "model": self.model, "parallel": ParallelSpec(ranks=self.ranks), "latent": torch.zeros(SHAPE),
            "spec": SampleSpec(seed=3, steps=STEPS, shift=5.0, guidance_scale=4.0), "positive": positive,
            "negative": negative, **changes,
        })  # fmt: skip

    def sample(self, after=None, **changes):
        return self.pipeline.sample(Job(self.message(**changes), Client(after), self.pipeline.device))

    def fails(self, name, do):
        """Notes the error, and that the next job is right."""
        try:
            do()
            self.said[name] = ["none", ""]
        except Exception as error:
            self.said[name] = [type(error).__name__, str(error)]

    def is_well(self):
        made = self.sample().tensor
        assert made is self.expected is None or torch.equal(made, self.expected)

    def experts(self):
        return self.pipeline.components.models.in_use.model.experts

    def weight(self, expert, name):
        return self.experts()[expert].get_parameter(name).data

    def steps(self):
        """On one rank only, as far as it goes: the others must hear of it."""
        name = "blocks.1.ffn.net.2.weight"
        low = self.weight(1, name)
        ulysses = {"parallel": ParallelSpec(ranks=self.ranks, ulysses_degree=self.ranks, cfg_degree=1)}
        for case, plan in (("expert", {}), ("expert, Ulysses", ulysses)):
            before = low.clone()
            if self.last:
                low.view(-1)[7] = torch.nan
            self.fails(case, lambda: self.sample(**plan))
            low.copy_(before)
            self.is_well()
        high = self.weight(0, name)
        kept = high.clone()
        self.fails("between steps", lambda: self.sample({1: lambda: high.fill_(torch.inf)}))
        high.copy_(kept)
        self.is_well()
        looks = iter(range(100))
        seen = denoising.is_finite
        with swapped(denoising, "is_finite", lambda x: seen(x) and not (self.last and next(looks) == 2)):
            self.fails("one rank", self.sample)
        self.is_well()
        computed = BlockCache.blocks

        def broken(cache, at, stack, tokens):
            return computed(cache, at, stack, tokens) * (torch.nan if at.step == 2 else 1)

        with swapped(BlockCache, "blocks", broken):
            self.fails("cache", lambda: self.sample(acceleration=CACHE))
        self.is_well()

    def overflows(self):
        """float16, in the second block, and of numbers that only a sum cannot hold: those are no fault."""
        half = {"model": DiffusionModelSpec(path=self.model.path, dtype="float16")}
        self.sample(**half)
        weight = self.weight(0, "blocks.1.ffn.net.2.weight")
        kept = weight.clone()
        weight.mul_(6e4)
        self.fails("float16", lambda: self.sample(**half))
        weight.copy_(kept)
        large = Conditioning(text=torch.full((1, 4, 32), 1e5))
        self.fails("float16, text", lambda: self.sample(**half, positive=large))
        self.sample()
        self.is_well()
        large = torch.full(SHAPE, 1e37)
        assert not large.sum().isfinite() and denoising.is_finite(large)

    def calls(self):
        setting = messages.CallSetting(model=self.model, parallel=ParallelSpec(ranks=self.ranks),
                                       run=messages.SamplerRun(number=1, sigmas=(1.0, 0.5, 0.0)))  # fmt: skip
        text = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(4))
        passes = [messages.ModelPass(branch=branch, latent=0, timesteps=torch.tensor([500.0]), inputs={"text": 7})
                  for branch in ("cond", "uncond")]  # fmt: skip
        message = messages.Velocity(job=1, setting=setting, step=1, latents=[torch.ones(SHAPE)], held={7: text},
                                    passes=passes, fresh=True)  # fmt: skip
        call = lambda: self.pipeline.velocity(Job(message, Client(), self.pipeline.device)).tensor  # noqa: E731
        expected = call()
        with spoilt(self.weight(1, "blocks.1.ffn.net.2.weight"), at=0):
            self.fails("call", call)
        made = call()
        assert expected is None or torch.equal(made, expected)

    def encoders(self):
        """Only rank 0 encodes."""
        message = messages.Encode(job=1, encoder=self.encoder, text="a fish")
        encode = lambda: self.pipeline.encode(Job(message, Client(), self.pipeline.device)).tensor  # noqa: E731
        expected, (spec, _) = encode(), self.pipeline._placed(self.encoder)
        self.pipeline.prompts._known.clear()
        if self.rank:
            encode()
        else:
            loaded = self.pipeline.components.get(spec, lambda *_: None)
            with spoilt(next(iter(loaded.encoders.values())).model.shared.weight.data, at=slice(None)):
                self.fails("encoder", encode)
        made = encode()
        assert expected is None or torch.equal(made, expected)


def main():
    torch.set_grad_enabled(False)
    folder, rank, ranks = gloo_ranks.join()
    cases = Cases(folder, rank, ranks)
    cases.steps()
    cases.overflows()
    cases.calls()
    cases.encoders()
    said = cases.said | videos(cases) | {"counts": counts(cases)}
    (folder / f"guard-{ranks}-{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


def counts(cases):
    """[of a job with the guard, of one without]: what differs, and what looks at latents."""
    made = []
    for guard in (denoising.is_finite, lambda latent: True):
        with swapped(denoising, "is_finite", guard), Counts() as noted:
            cases.sample()
        made.append(noted)
    with_guard, without = made
    return {
        "added": with_guard.operators - without.operators, "missing": without.operators - with_guard.operators,
        "of latents": with_guard.of_latents - without.of_latents,
        "exchanges": [+with_guard.exchanges, +without.exchanges],
    }  # fmt: skip


def videos(cases):
    """What decoding and encoding say of a VAE, of its input, and of frames that are drawn in its place."""
    vae = cases.pipeline.components.get(cases.vae, lambda *_: None)
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(LATENT, generator=generator)
    outs = {}

    def decode(given=latent):
        batch, _, length, height, width = given.shape
        outs["frames"] = torch.zeros(batch * (4 * length - 3), 8 * height, 8 * width, 3)
        return video.decode_video(vae, given, outs["frames"], lambda *_: None).get("warnings", [])

    def encode(frames):
        made = torch.zeros(1, 16, (len(frames) + 3) // 4, frames.shape[1] // 8, frames.shape[2] // 8)
        return video.encode_video(vae, frames, made, lambda *_: None).get("warnings", [])

    found, cases.said = {}, {}
    assert decode() == []
    weight = vae.network.decoder.conv_out.weight.data
    if cases.last:
        with spoilt(weight, at=0):
            cases.fails("VAE's weight", decode)
    else:
        cases.fails("VAE's weight", decode)
    frames = torch.rand(9, 32, 64, 3, generator=generator)
    with spoilt(frames, at=-1):
        cases.fails("VAE's video", lambda: encode(frames))
    frames[-1, -1, -1, -1] = 3e38
    cases.fails("VAE's large video", lambda: encode(frames))
    found["still image"] = encode(torch.rand(1, 32, 64, 3, generator=generator).expand(9, -1, -1, -1))
    for name, draw in DRAWN.items():
        with drawn(vae, draw):
            found[name] = decode(torch.ones(LATENT) if name == "still latent" else latent)
    with drawn(vae, lambda t, frame: frame):
        found["one frame"] = decode(latent[:, :, :1])
    assert decode() == []
    return cases.said | found


@contextmanager
def drawn(vae, draw):
    """The VAE makes frames [3, t, h, w] of what `draw` makes of a frame's number and of a fixed picture [3, h, w]."""
    made = type(vae).decoded

    def decoded(latent, tile):
        number = 0
        for content in made(vae, latent, tile):
            picture = torch.linspace(-1, 1, content[:, 0].numel()).view_as(content[:, 0])
            drawn_frames = [draw(number + n, picture) for n in range(content.shape[1])]
            number += content.shape[1]
            yield torch.stack(drawn_frames, dim=1)

    vae.decoded = decoded
    try:
        yield
    finally:
        del vae.decoded


def _bright(number, picture):
    """Black, with an object of one pixel that moves."""
    frame = torch.full_like(picture, -1.0)
    frame[:, 3, 4 + number] = 1.0
    return frame


def _moving(number, picture):
    """The same values in all frames, elsewhere in each."""
    return picture.roll(number, -1)


DRAWN = {
    "black": lambda number, picture: torch.full_like(picture, -1.0),
    "grey": lambda number, picture: torch.zeros_like(picture) + number / 100,
    "faded": lambda number, picture: picture + number / 50 if number < 5 else torch.full_like(picture, -1.0),
    "short fade": lambda number, picture: picture + number / 50 if number < 6 else torch.full_like(picture, -1.0),
    "still": lambda number, picture: picture,
    "still latent": lambda number, picture: picture,
    "bright object": _bright,
    "moving": _moving,
}
