"""Trains the embedded tiny Wan from scratch: synthetic clips -> VAE -> cached latents -> transformer and text encoder.

    python scripts/train_tiny_wan.py                                  everything, resuming existing checkpoints
    python scripts/train_tiny_wan.py --stages dit export samples      single stages
    python scripts/train_tiny_wan.py --device cuda --vae-minutes 4 --dit-minutes 8

Budgets are minutes of work (on a CPU, of processor time per thread), and schedules scale with them. Checkpoints, loss
curves and contact sheets go to --out; the model goes to --model. Needs matplotlib in addition to the runtime's
packages.

On Linux, GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8000000000 keeps
freed memory for the next step: on a busy machine a VAE step took 2 s of processor time per thread instead of 4.5 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from check_tiny_wan import ground_truth, reconstruct, to_frames
from tiny_wan import world
from tiny_wan.dit_training import build_modules, dit_stage
from tiny_wan.export import export
from tiny_wan.generate import diffusers_engine
from tiny_wan.latents import cache_latents, load_latents
from tiny_wan.loop import load_averages, train
from tiny_wan.preview import write_latent_rgb
from tiny_wan.sheet import contact_sheet, loss_curve
from tiny_wan.vae_model import build_vae
from tiny_wan.vae_training import decoder_stage, vae_stage

ROOT = Path(__file__).resolve().parent.parent


def run_vae(args: argparse.Namespace) -> None:
    stage = vae_stage(args.vae_minutes, args.device)
    train(stage, args.out, args.seed)
    loss_curve(args.out / "vae_loss.png", "VAE reconstruction", stage.losses)


def run_latents(args: argparse.Namespace) -> None:
    (vae,) = load_averages(args.out / "vae.pt", [build_vae()])
    cache_latents(vae, args.clips, args.out / "latents.pt", args.seed, args.device)


def run_dit(args: argparse.Namespace) -> None:
    cache = load_latents(args.out / "latents.pt")
    stage = dit_stage(cache["latents"], cache["captions"], args.dit_minutes, args.device)
    train(stage, args.out, args.seed)
    loss_curve(args.out / "dit_loss.png", "flow matching", stage.losses)


def run_decoder(args: argparse.Namespace) -> None:
    (vae,) = load_averages(args.out / "vae.pt", [build_vae()])
    stage = decoder_stage(vae, args.decoder_minutes, args.device)
    train(stage, args.out, args.seed)
    loss_curve(args.out / "decoder_loss.png", "VAE decoder", stage.losses)


def run_export(args: argparse.Namespace) -> None:
    (vae,) = load_averages(args.out / "vae.pt", [build_vae()])
    if (args.out / "decoder.pt").exists():
        load_averages(args.out / "decoder.pt", [nn.ModuleList([vae.post_quant_conv, vae.decoder])])
    transformer, encoder = load_averages(args.out / "dit.pt", build_modules())
    cache = load_latents(args.out / "latents.pt")
    write_latent_rgb(args.model, vae, cache["mean"], cache["std"], args.seed)
    export(args.model, vae, transformer, encoder, cache["mean"], cache["std"])


def run_samples(args: argparse.Namespace) -> None:
    clips, scenes = ground_truth(args.seed)
    frames = to_frames(reconstruct(args.model, clips))
    contact_sheet(args.out / "reconstructions.png", frames, [scene.caption for scene in scenes])
    prompts = [scene.caption for scene in world.held_out_scenes()[::4]]
    with diffusers_engine(args.model) as generate:
        videos = generate(prompts, args.seed, 4.0, 20)
    contact_sheet(args.out / "samples.png", videos, prompts)


STAGES = {
    "vae": run_vae,
    "latents": run_latents,
    "dit": run_dit,
    "decoder": run_decoder,
    "export": run_export,
    "samples": run_samples,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "train_tiny_wan")
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "tiny_wan")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-minutes", type=float, default=30)
    parser.add_argument("--dit-minutes", type=float, default=40)
    parser.add_argument("--decoder-minutes", type=float, default=15)
    parser.add_argument("--clips", type=int, default=3072, help="in the cache of latents")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    from ascend_runtime.hardware import cores  # found since check_tiny_wan was imported

    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(cores.usable_cores())
    for name in args.stages:
        STAGES[name](args)


if __name__ == "__main__":
    main()
