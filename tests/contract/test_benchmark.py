"""(d) The benchmark of a machine with NPUs, its NPU operators on CPU stand-ins: it measures every operator and way."""

import json
from pathlib import Path

import pytest

SITE = Path(__file__).resolve().parent / "site" / "sitecustomize.py"
WAYS = {"a2": {"fused", "laser", "infer", "fastest", "plain"}, "a3": {"laser", "infer", "plain"},
        "a5": {"fused", "infer", "fastest", "fp8", "plain"}}  # fmt: skip
LINEARS = {"a2": {"quantized_linear", "static_linear", "int4_linear"},
           "a3": {"quantized_linear", "static_linear", "int4_linear"},
           "a5": {"quantized_linear", "static_linear", "mx_linear"}}  # fmt: skip
SOCS = {"a2": "Ascend910B4", "a3": "Ascend910_9391", "a5": "Ascend950PR"}
OTHERS = {"attention_with_lse", "sparse_attention", "rms_norm", "rms_norm_per_head", "layer_norm",
          "modulated_layer_norm", "modulated_layer_norm_per_token", "gated_add", "rotary", "gelu"}  # fmt: skip


@pytest.mark.parametrize("card", WAYS)
def test_every_operator_and_way_is_measured(python_on, tmp_path, card):
    calls, played = tmp_path / "calls", tmp_path / "card"
    played.write_text(card)
    code = f"""
        import os, runpy, sys, torch
        os.environ.update(ASCEND_RUNTIME_OPERATORS="npu", CONTRACT_CALLS={str(calls)!r}, CONTRACT_CARD={str(played)!r})
        runpy.run_path({str(SITE)!r})
        torch.set_num_threads(1)
        sys.argv = ["operators", "cpu", {str(tmp_path)!r}, "--quick"]
        from benchmarks.ascend import operators
        operators.main()
    """
    said = python_on(SOCS[card], code)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    left_out = (tmp_path / "notes.jsonl").read_text()
    attentions = {f"{kind}_{way}" for kind in ("attention", "cross_attention") for way in WAYS[card]}
    names = {f"ascend.{name}_{what}" for name in attentions | OTHERS | LINEARS[card] for what in ("error", "time")}
    assert {row["name"] for row in rows} == names, said
    for way in WAYS["a2"] | WAYS["a5"]:
        assert (f'"attention {way}"' in left_out) == (way not in WAYS[card])
    for row in rows:
        assert row["context"]["operators"] == "AscendOperators"
        if row["name"].endswith("_error"):
            assert 0 < row["value"] <= row["baseline"], row
    called = {line.split()[1] for line in calls.read_text().splitlines()}
    assert called >= {"npu::npu_fused_infer_attention_score", "npu::npu_rms_norm", "npu::npu_rotary_mul",
                      "npu::npu_gelu"}  # fmt: skip
    assert ("npu::npu_fusion_attention" in called) == ("fused" in WAYS[card])


@pytest.mark.parametrize("line, soc", SOCS.items())
def test_the_cards_are_described_by_the_real_torch_npu(python_on, line, soc):
    code = """
        import sys
        sys.argv = ["machine", "npu"]
        from benchmarks.ascend import machine
        machine.main()
    """
    found = json.loads(python_on(soc, code, devices=8).splitlines()[-1])
    assert (found["name"], found["line"]) == (soc, line) and found["gibibytes"] > 0 and "cann" in found
