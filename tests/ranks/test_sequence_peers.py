"""Our attention over a sequence that several ranks share equals that of other packages: yunchang's, xfuser's."""

import json
import os
import subprocess
import sys

import gloo_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close


@pytest.mark.parametrize("ranks, tokens, heads", [(2, 48, 4), (3, 51, 6)])
def test_ulysses_equals_yunchangs(tmp_path, ranks, tokens, heads):
    compare(tmp_path, ranks, tokens, heads, peer="yunchang", ring=1, ulysses=ranks)


@pytest.mark.parametrize("ring, ulysses", [(2, 1), (1, 2), (2, 2)])
def test_usp_equals_xfusers(tmp_path, ring, ulysses):
    skip_unless_it_can_be_imported("xfuser.model_executor.layers.usp")
    compare(tmp_path, ring * ulysses, 48, 4, peer="xfuser", ring=ring, ulysses=ulysses)


def skip_unless_it_can_be_imported(module):
    """Tried in a process of its own, since an import that fails in the middle leaves its first half behind."""
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{module} cannot be imported here: {tried.stderr.splitlines()[-1]}")


def compare(folder, ranks, tokens, heads, **case):
    """Sizes that divide: the others take no more."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    inputs = {name: torch.randn(2, tokens, heads, 16, generator=generator) for name in ("query", "key", "value")}
    inputs["key"] *= 4  # a sharp softmax, which a wrong merge cannot hide behind
    save_file(inputs, folder / "inputs.safetensors")
    (folder / "case.json").write_text(json.dumps(case))
    gloo_ranks.run("peer_rank.py", folder, ranks)
    for rank in range(ranks):
        out = load_file(folder / f"out-{rank}.safetensors")
        assert out["theirs"].std() > 0.1
        assert_close(out["ours"], out["theirs"], atol=1e-5, rtol=0.0)
