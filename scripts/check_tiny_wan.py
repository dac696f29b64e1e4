"""Checks whether the embedded model follows its prompt: reads attributes off frames, and checks the reader first.

    python scripts/check_tiny_wan.py            reader, then 48 held-out prompts with and without guidance
    python scripts/check_tiny_wan.py --vae      reader, then the VAE's reconstructions

Exits with 1 if a score is below its bar. Needs matplotlib in addition to the runtime's packages.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from tiny_wan import reader, world
from tiny_wan.generate import ENGINES, Generate
from tiny_wan.sheet import contact_sheet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # of ascend_runtime
NUM_CLIPS = 24  # of ground truth and of reconstructions
VAE_BAR = 22  # of NUM_CLIPS, each attribute
AVERAGE_BAR, ALL_FOUR_BAR = 0.85, 0.60


def score(clips: list[np.ndarray], scenes: list[world.Scene]) -> dict[str, float]:
    """The number of clips `[T,H,W,3]` that are read correctly: for each attribute, and for all four."""
    right = np.array([[reader.read(clip)[name] == getattr(scene, name) for name in world.ATTRIBUTES]
                      for clip, scene in zip(clips, scenes, strict=True)])  # fmt: skip
    counts = dict(zip(world.ATTRIBUTES, right.sum(0).tolist()))
    return counts | {"all four": int(right.all(1).sum()), "average": float(right.mean()), "clips": len(clips)}


def ground_truth(seed: int) -> tuple[torch.Tensor, list[world.Scene]]:
    """24 clips `[B,3,T,H,W]` in -1..1 of scenes drawn from the whole world."""
    generator = torch.Generator().manual_seed(seed)
    scenes = world.draw_scenes(world.all_scenes(), NUM_CLIPS, generator)
    return world.render(scenes, generator), scenes


def to_frames(clips: torch.Tensor) -> list[np.ndarray]:
    """Clips `[B,3,T,H,W]` in -1..1 to frames `[T,H,W,3]` in 0..1."""
    return list((clips.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy())


@torch.no_grad()
def reconstruct(folder: Path, clips: torch.Tensor) -> torch.Tensor:
    """Encodes and decodes with the VAE, as diffusers runs it."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.decode(vae.encode(clips).latent_dist.mode()).sample


def show(name: str, result: dict[str, float]) -> None:
    cells = [f"{result[key]:>3}/{result['clips']}" for key in (*world.ATTRIBUTES, "all four")]
    print(f"{name:<26}" + "".join(f"{cell:>12}" for cell in cells) + f"{result['average']:>10.1%}", flush=True)


def check_vae(folder: Path, seed: int, out: Path) -> tuple[dict[str, float], bool]:
    clips, scenes = ground_truth(seed)
    frames = to_frames(reconstruct(folder, clips))
    result = score(frames, scenes)
    error = np.mean([(a - b) ** 2 for a, b in zip(frames, to_frames(clips))])
    result["psnr_db"] = float(-10 * np.log10(error))
    show("VAE reconstructions", result)
    print(f"{'':<26}PSNR {result['psnr_db']:.1f} dB over whole frames")
    contact_sheet(out / "reconstructions.png", frames, [scene.caption for scene in scenes])
    return result, all(result[name] >= VAE_BAR for name in world.ATTRIBUTES)


def check_generation(generate: Generate, args: argparse.Namespace, out: Path) -> tuple[dict[str, dict], bool]:
    """The held-out prompts: with guidance, with another seed, and without guidance."""
    scenes = world.held_out_scenes()
    captions = [scene.caption for scene in scenes]
    runs = {
        "held-out prompts": (args.seed, args.guidance_scale),
        "another seed": (args.seed + 1000, args.guidance_scale),
        "without guidance": (args.seed, 1.0),
    }
    results, clips = {}, {}
    for name, (seed, guidance_scale) in runs.items():
        clips[name] = generate(captions, seed, guidance_scale, args.steps)
        results[name] = score(clips[name], scenes) | {"seed": seed, "guidance_scale": guidance_scale}
        show(name, results[name])
        contact_sheet(out / f"{name.replace(' ', '_')}.png", clips[name], captions)
    change = float(np.mean([np.abs(a - b).mean() for a, b in zip(clips["held-out prompts"], clips["another seed"])]))
    results["another seed"]["mean_change"] = change
    print(f"{'':<26}another seed changes a pixel by {change:.3f} of 1 on average")
    bars = {
        "average": results["held-out prompts"]["average"] >= AVERAGE_BAR,
        "all four": results["held-out prompts"]["all four"] >= ALL_FOUR_BAR * len(scenes),
        "guidance helps": results["without guidance"]["average"] < results["held-out prompts"]["average"],
        "seed changes the video": change > 0.01,
        "attributes stay": results["another seed"]["average"] >= AVERAGE_BAR,
    }
    for bar, met in bars.items():
        print(f"  {'met   ' if met else 'MISSED'}  {bar}")
    return results, all(bars.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "assets" / "tiny_wan")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "check_tiny_wan", help="sheets and scores.json")
    parser.add_argument("--vae", action="store_true", help="check reconstructions instead of generations")
    parser.add_argument("--engine", choices=ENGINES, default="runtime")
    parser.add_argument("--ranks", type=int, default=1, help="of the runtime")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    header = "".join(f"{name:>12}" for name in (*world.ATTRIBUTES, "all four"))
    print(f"seed {args.seed}, {args.steps} steps, guidance {args.guidance_scale}\n{'':<26}{header}{'average':>10}")
    clips, scenes = ground_truth(args.seed)
    truth = score(to_frames(clips), scenes)
    show("ground truth", truth)
    if truth["all four"] < NUM_CLIPS:
        print("The reader misreads ground truth; its other scores would mean nothing.")
        return 1
    if args.vae:
        results, met = check_vae(args.model, args.seed, args.out)
    else:
        with ENGINES[args.engine](args.model, args.ranks) as generate:
            results, met = check_generation(generate, args, args.out)
    (args.out / "scores.json").write_text(json.dumps({"ground truth": truth, "result": results}, indent=2) + "\n")
    print(f"sheets and scores in {args.out}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
