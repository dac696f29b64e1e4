"""(d) The benchmark of a machine with NPUs, its NPU operators on CPU stand-ins: it measures every operator and way."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WAYS = ("fused", "laser", "infer", "fastest", "plain")
OTHERS = {"attention_with_lse", "rms_norm", "layer_norm", "modulated_layer_norm", "modulated_layer_norm_per_token",
          "gated_add", "rotary", "gelu"}  # fmt: skip


def test_every_operator_and_way_is_measured(tmp_path):
    file, calls = tmp_path / "rows.jsonl", tmp_path / "calls"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE / "site"), os.environ["PYTHONPATH"]]),
                   "ASCEND_RUNTIME_OPERATORS": "npu", "CONTRACT_CALLS": str(calls), "CONTRACT_CARD": "a2",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.operators", "cpu", str(file), "--quick"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    attentions = {f"{kind}_{way}" for kind in ("attention", "cross_attention") for way in WAYS}
    names = {f"ascend.{name}_{what}" for name in attentions | OTHERS for what in ("error", "time")}
    assert {row["name"] for row in rows} == names, done.stdout + done.stderr
    assert done.returncode == 0 and "attention fp8: left out" in done.stdout
    for row in rows:
        assert row["context"]["operators"] == "AscendOperators"
        if row["name"].endswith("_error"):
            assert 0 < row["value"] <= row["baseline"], row
    called = {line.split()[1] for line in calls.read_text().splitlines()}
    assert called >= {"npu::npu_fusion_attention", "npu::npu_fused_infer_attention_score", "npu::npu_rms_norm",
                      "npu::npu_rotary_mul", "npu::npu_gelu"}  # fmt: skip
