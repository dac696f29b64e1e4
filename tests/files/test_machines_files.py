"""Machines whose files differ: which, on which machines, and what to do, before anything is loaded."""

import shutil
from pathlib import Path

import gloo_ranks
import torch
from ascend_runtime.engine.same_files.differences import MAX_DIFFERENCES, difference
from ascend_runtime.engine.same_files.listing import HeldFile, Listing
from safetensors.torch import save_file

MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"
LORA = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.full((2, 192), 0.01),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.full((192, 2), 0.01)}  # fmt: skip


def test_machines_with_other_files_are_refused_by_name_and_go_on_when_they_are_mended(tmp_path):
    for models in ("atlas1/models", "atlas2/disk/models"):
        shutil.copytree(MODEL, tmp_path / models / "wan")
        save_file(LORA, tmp_path / models / "lora.safetensors")
    gloo_ranks.run("machines_files_rank.py", tmp_path, 3)
