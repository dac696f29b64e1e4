"""A rank that keeps a ledger of its jobs, for a test: `main()` by gloo_ranks, in FOLDER.

FOLDER holds a checkpoint of Wan ("model"), one of HunyuanVideo ("hunyuan") and cases.json: the jobs of a group by its
number of ranks. The rank writes what it exchanged in each job, and how many communicators it then counted, to
ledger-RANKS-RANK.json. FSDP gathers as it does on devices.
"""

import json
import os

import ascend_runtime.models.hunyuan_video.conditioning  # with the next four, what the first job would import
import ascend_runtime.models.hunyuan_video.networks
import ascend_runtime.models.wan.conditioning
import ascend_runtime.models.wan.networks
import ascend_runtime.models.wan.vae.video_vae
import gloo_ranks
import random_hunyuan
import tiny_models
import torch
import torch.distributed as dist
from ascend_runtime import Conditioning, DiffusionModelSpec, ParallelSpec, SampleSpec, TextEncoderSpec, VaeSpec
from ascend_runtime.engine import video
from ascend_runtime.engine.job import Job
from ascend_runtime.engine.pipeline import RankPipeline
from ascend_runtime.parallel.mesh import communicators
from ascend_runtime.wire import messages
from ascend_runtime.wire.channel import channel_pair
from ledger import Ledger
from torch.distributed.fsdp import FSDPModule

SHAPE = (1, 16, 2, 4, 6)
# In groups of so many ranks, torch compares the ranks' collectives, too. It counts sends and receives, so it cannot
# where ranks have different numbers of neighbours.
COMPARED = (2, 4)


def main():
    torch.set_grad_enabled(False)
    FSDPModule.set_custom_all_gather = lambda *_: None
    if int(os.environ["WORLD_SIZE"]) in COMPARED:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    folder, rank, ranks = gloo_ranks.join()
    rank_of, kept = RankWithLedger(folder), []
    for case in json.loads((folder / "cases.json").read_text())[str(ranks)]:
        kept.append({"entries": rank_of.does(**case), "communicators": communicators()})
    (folder / f"ledger-{ranks}-{rank}.json").write_text(json.dumps(kept))
    dist.barrier()
    dist.destroy_process_group()


class RankWithLedger:
    def __init__(self, folder):
        self.pipeline = RankPipeline(torch.device("cpu"))
        self._path, self._hunyuan = str(folder / "model"), str(folder / "hunyuan")

    def does(self, work, **given):
        """unnamed: leaves out the group of each send and receive."""
        with Ledger() as ledger:
            if given.pop("unnamed", False):
                noted = dist.P2POp
                dist.P2POp = lambda op, x, peer, group: noted(op, x, peer)
            getattr(self, work)(**given)
        return ledger.entries

    def sample(self, guidance_scale=4.0, **plan):
        generator = torch.Generator().manual_seed(4)
        prompts = {name: Conditioning(text=torch.randn(1, 12, 32, generator=generator))
                   for name in ("positive", "negative")[: 1 if guidance_scale == 1 else 2]}  # fmt: skip
        self._sample(self._path, guidance_scale, generator, plan, prompts)

    def sample_hunyuan(self, **plan):
        generator = torch.Generator().manual_seed(4)
        self._sample(self._hunyuan, 1.0, generator, plan, {"positive": random_hunyuan.conditioning()})

    def _sample(self, path, guidance_scale, generator, plan, prompts):
        spec = SampleSpec(seed=3, steps=2, shift=5.0, guidance_scale=guidance_scale, solver="euler")
        self._job(messages.Sample, model=DiffusionModelSpec(path=path), parallel=ParallelSpec(**plan), spec=spec,
                  latent=torch.randn(SHAPE, generator=generator), **prompts)  # fmt: skip

    def encode(self):
        self._job(messages.Encode, encoder=TextEncoderSpec(path=self._path, placement="ranks"), text="a red circle")

    def decode(self, height, width):
        video.decode_video(self._vae(), torch.randn(1, 16, 2, height, width),
                           torch.zeros(5, 8 * height, 8 * width, 3), lambda *_: None)  # fmt: skip

    def decode_hunyuan(self, height, width):
        """Also the statistics of norms."""
        vae = tiny_models.on_ranks(tiny_models.hunyuan_vae())
        video.decode_video(vae, torch.randn(1, 16, 2, height, width), torch.zeros(5, 8 * height, 8 * width, 3),
                           lambda *_: None, "whole")  # fmt: skip

    def encode_video(self, height, width):
        video.encode_video(self._vae(), torch.rand(5, 8 * height, 8 * width, 3),
                           torch.zeros(1, 16, 2, height, width), lambda *_: None)  # fmt: skip

    def _vae(self):
        return self.pipeline.components.get(VaeSpec(path=self._path), lambda *_: None)

    def _job(self, kind, **given):
        work = {messages.Sample: self.pipeline.sample, messages.Encode: self.pipeline.encode}[kind]
        channel, other = channel_pair()  # of each job, as nobody reads its messages, which would fill one channel
        work(Job(kind(job=1, **given), channel, self.pipeline.device))
        channel.close()
        other.close()
