"""Jobs of every kind, one after the other, with cancels, refusals, callbacks that raise and memory given back: nothing
is left of them, in the client or in the ranks, and the last video is the first.

100 jobs by default; 2,000 with --soak, whose memory must not grow in the long run either.
"""

import gc
import os
import random
import statistics

import pytest
import torch
from ascend_runtime import JobCancelled, SampleSpec
from killed_client import SHAPE
from new_prompts import new_prompt
from rank_processes import resident_mb, shared_memory

FEW, MANY = 100, 2000
WARM, SETTLED = 30, 500  # jobs after which a short run, and the slope of a long one, are measured
GROWTH, SLOPE = 20.0, 0.005  # MB of a process in a short run; MB a job in a long one


class Soak:
    """Mixed jobs on two ranks, and what they leave behind."""

    def __init__(self, runtime, specs, rng):
        self.runtime, self.specs, self.rng = runtime, specs, rng
        self.jobs = [self.video, self.video, self.prompt, self.long_decode, self.encode_video, self.load, self.free,
                     self.cancelled, self.refused, self.wrong_argument, self.raising]  # fmt: skip

    def latent(self, **hooks):
        spec = SampleSpec(seed=1, steps=4, guidance_scale=3.0)
        texts = self.specs.text(1), self.specs.text(2)
        return self.runtime.sample(self.specs.model, spec, torch.zeros(SHAPE), *texts, **hooks).tensor

    def video(self):
        return self.runtime.decode(self.specs.vae, self.latent()).tensor

    def prompt(self):
        self.runtime.encode(self.specs.encoder, new_prompt())

    def long_decode(self):
        self.runtime.decode(self.specs.vae, torch.zeros(1, 16, self.rng.randint(1, 5), 8, 8))

    def encode_video(self):
        self.runtime.encode_video(self.specs.vae, torch.zeros(4 * self.rng.randint(0, 3) + 1, 32, 64, 3))

    def load(self):
        self.runtime.load(self.specs.model, self.specs.encoder, self.specs.vae)

    def free(self):
        self.runtime.free()

    def cancelled(self):
        after = self.rng.randint(1, 3)
        with pytest.raises(JobCancelled):
            self.latent(on_progress=lambda stage, step, total: step >= after and self.runtime.cancel())

    def refused(self):
        with pytest.raises(ValueError, match="multiple of 16"):
            spec = SampleSpec(steps=1)
            self.runtime.sample(self.specs.model, spec, torch.zeros(1, 16, 1, 5, 4), self.specs.text(1))

    def wrong_argument(self):
        with pytest.raises(ValueError, match="half a character"):
            self.runtime.encode(self.specs.encoder, "a cat \ud83d")

    def raising(self):
        error = self.rng.choice([RuntimeError, KeyboardInterrupt, SystemExit])

        def callback(*_):
            raise error

        with pytest.raises(error):
            self.latent(on_progress=callback)

    @property
    def processes(self):
        return [os.getpid(), *self.runtime.pids]

    def left(self):
        """Descriptors and threads of each process, and memory files of all, at rest."""
        self.video()  # so that each process keeps what it keeps for the next message
        gc.collect()
        counts = [[len(os.listdir(f"/proc/{pid}/{what}")) for pid in self.processes] for what in ("fd", "task")]
        return *counts, len(shared_memory(self.processes))

    def memory(self):
        gc.collect()
        return [resident_mb(pid) for pid in self.processes]


@pytest.mark.timeout(3600)
def test_nothing_is_left_of_many_jobs(request, new_runtime, specs):
    count = MANY if request.config.getoption("--soak") else FEW
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with new_runtime(2) as runtime:
        soak = Soak(runtime, specs, random.Random(seed))
        soak.load()
        first, pids, measured = soak.video(), runtime.pids, {}
        for number in range(1, count + 1):
            each_once = number <= len(soak.jobs)
            job = soak.jobs[number - 1] if each_once else soak.rng.choice(soak.jobs)
            job()
            if number == WARM:
                left, memory = soak.left(), soak.memory()
            if number > SETTLED and number % 10 == 0:
                soak.video()  # at rest in the same way each time
                measured[number] = soak.memory()
        assert torch.equal(soak.video(), first)
        assert runtime.pids == pids
        assert soak.left() == left
        grown = [after - before for before, after in zip(memory, soak.memory())]
        print(f"grown by {grown} MB from job {WARM} to {count}")
        if not measured:
            assert max(grown) < GROWTH, grown
        else:
            slopes = [statistics.linear_regression(list(measured), values).slope for values in zip(*measured.values())]
            print(f"slopes {[f'{1000 * slope:.2f} kB' for slope in slopes]} a job")
            assert max(slopes) < SLOPE, slopes
