"""A process that uses the runtime as ComfyUI does, for tests that kill it: `killed_client.py CHECKPOINT LATENT PLAN
[CLUSTER]`.

Makes one video from nothing, by the plan (JSON, the fields of ParallelSpec), on the ranks of a cluster (the same, of
Cluster) if one is given, says on standard output which phase it has
come to, writes the latent to the file LATENT and then idles. What the job is, is known to the tests by `latent_of`.
"""

import json
import sys
import time
from pathlib import Path

import torch
from ascend_runtime import (
    Cluster,
    DiffusionModelSpec,
    ParallelSpec,
    Runtime,
    SampleSpec,
    TextEncoderSpec,
    VaeSpec,
)
from new_prompts import new_prompt
from safetensors.torch import save_file

SHAPE = (1, 16, 5, 8, 8)
PHASES = ("start", "load", "encode", "step", "decode", "encode video", "idle")
_STAGES = {"load": "load", "encode": "encode", "denoise": "step", "decode": "decode"}


def latent_of(runtime, folder, on_phase=lambda phase: None, parallel=None, and_back=False):
    """The latent [B,C,T,H,W] of the one job, by way of all phases as far as "decode"; and_back: "encode video" too."""
    model, encoder, vae = (kind(path=str(folder)) for kind in (DiffusionModelSpec, TextEncoderSpec, VaeSpec))

    def on_progress(stage, step, total):
        on_phase(_STAGES[stage])

    on_phase("start")
    runtime.start()
    text = runtime.encode(encoder, new_prompt(), on_progress=on_progress).tensor
    spec = SampleSpec(seed=1, steps=6, guidance_scale=3.0)
    start, nothing = torch.zeros(SHAPE), torch.zeros_like(text)
    latent = runtime.sample(model, spec, start, text, nothing, parallel=parallel, on_progress=on_progress)
    long = latent.tensor.repeat(1, 1, 4, 1, 1)
    frames = runtime.decode(vae, long, on_progress=on_progress).tensor
    if and_back:
        small = frames[:, :32, :32]  # less than what a client keeps for its next message
        runtime.encode_video(vae, small, on_progress=lambda *_: on_phase("encode video"))
    return latent.tensor


def main():
    folder, latent_file = map(Path, sys.argv[1:3])
    cluster = Cluster(**json.loads(sys.argv[4])) if sys.argv[4:] else None
    runtime = Runtime(ParallelSpec(**json.loads(sys.argv[3])), device="cpu", cluster=cluster)
    said = set()

    def say(phase):
        if phase not in said:
            said.add(phase)
            print(phase, flush=True)

    latent = latent_of(runtime, folder, say, and_back=True)
    save_file({"latent": latent}, latent_file)
    say("idle")
    time.sleep(600)


if __name__ == "__main__":
    main()
