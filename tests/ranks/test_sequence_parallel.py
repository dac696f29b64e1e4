"""Attention over a sequence that several ranks share equals attention over the whole: Ulysses, ring, and both."""

import json
import os

import gloo_ranks
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sequence_rank import NAMES
from torch.testing import assert_close

CASES = {
    2: [(2, 1, "rotate", False, 50, 4), (2, 1, "gather", False, 51, 4), (1, 2, "rotate", False, 51, 5),
        (1, 2, "rotate", True, 50, 5), (1, 2, "rotate", True, 7, 1)],
    3: [(3, 1, "rotate", False, 50, 4), (3, 1, "gather", False, 49, 4), (1, 3, "rotate", True, 50, 8)],
    # 9 tokens on 4 ranks: the last has nothing but padding
    4: [(4, 1, "rotate", False, 9, 3), (4, 1, "gather", False, 9, 3), (4, 1, "rotate", False, 64, 2),
        (2, 2, "rotate", False, 51, 6), (2, 2, "rotate", True, 53, 5), (2, 2, "gather", True, 5, 1),
        (1, 4, "rotate", True, 50, 6)],
}  # fmt: skip


@pytest.mark.parametrize("ranks", CASES)
def test_equals_plain_attention(tmp_path, ranks):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    cases = [dict(zip(NAMES, case)) for case in CASES[ranks]]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    expected = []
    for number, case in enumerate(cases):
        shape = (2, case["tokens"], case["heads"], 16)
        inputs = {name: torch.randn(shape, generator=generator) for name in ("query", "key", "value")}
        inputs["key"] *= 4  # a sharp softmax, which a wrong merge cannot hide behind
        save_file(inputs, tmp_path / f"{number}.safetensors")
        query, key, value = (x.transpose(1, 2) for x in inputs.values())
        expected.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
    for outs in attend_on_ranks(tmp_path, ranks):
        for number, case in enumerate(cases):
            assert_close(outs[str(number)], expected[number], atol=1e-5, rtol=0.0, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_it_is_no_worse_than_plain_attention(tmp_path, dtype):
    """Against fp64: parts of a ring are rounded before they merge, but merge in fp32."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    cases = [dict(zip(NAMES, case)) for case in [(4, 1, "rotate", False, 256, 4), (2, 2, "gather", True, 255, 5)]]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    wanted = []
    for number, case in enumerate(cases):
        shape = (2, case["tokens"], case["heads"], 16)
        inputs = {name: torch.randn(shape, generator=generator).to(dtype) for name in ("query", "key", "value")}
        save_file(inputs, tmp_path / f"{number}.safetensors")
        query, key, value = (x.transpose(1, 2) for x in inputs.values())
        exact, plain = (F.scaled_dot_product_attention(*(x.to(kind) for x in (query, key, value)))
                        .transpose(1, 2).flatten(2) for kind in (torch.float64, dtype))  # fmt: skip
        wanted.append((exact, (plain - exact).abs().mean().item()))
    outs = attend_on_ranks(tmp_path, 4)[0]
    for number, (exact, plain) in enumerate(wanted):
        error = (outs[str(number)] - exact).abs().mean().item()
        print(f"{cases[number]}: mean error {error:.2e}, of plain attention {plain:.2e}")
        assert error < 1.3 * plain


def attend_on_ranks(folder, ranks):
    """What each rank has of the attention of each case, by its number."""
    gloo_ranks.run("sequence_rank.py", folder, ranks)
    return [load_file(folder / f"out-{rank}.safetensors") for rank in range(ranks)]
