"""The benchmarks run, and write the figures that they promise; what the figures are is not tested here."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ascend_runtime import SampleSpec, VideoSize
from ascend_runtime.client.submission import Result
from ascend_runtime.ops import PlainOperators
from benchmarks import caches, modes, operators, workloads
from benchmarks.opens import Opened
from benchmarks.report import Failures

ROOT = Path(__file__).resolve().parents[2]
TRANSPORT = ["transport.null_ms", "transport.request_ms", "transport.frames_s"]
PEERS = ["socket", "ray"]
OPERATORS = ["attention_plain", "cross_attention_plain", "attention_with_lse", "rms_norm", "layer_norm",
             "modulated_layer_norm", "modulated_layer_norm_per_token", "gated_add", "rotary", "gelu"]  # fmt: skip
MODES = ["cfg2", "ulysses2", "ulysses2_overlap", "ulysses2_fsdp", "ring2", "ring2_gather", "tp2"]
NAMES = {
    "transport": {*TRANSPORT, *(f"{name}_vs_{peer}" for name in TRANSPORT for peer in PEERS)},
    "warm": {"warm.cold_start_s", "warm.late_over_early", "warm.rss_slope_mb", "warm.weight_opens"},
    "ascend": {*(f"ascend.{name}_{what}" for name in OPERATORS for what in ("error", "time")),
               *(f"ascend.{mode}_{what}" for mode in MODES for what in ("speedup", "difference"))},
    "scaling": {*(f"scaling.{mode}2" for mode in ("ulysses", "ulysses_overlap", "ring", "ring_gather", "cfg")),
                "scaling.pipeline1_vs_diffusers", "scaling.pipeline2_vs_diffusers"},
    "load": {*(f"load.{what}.{ranks}" for what in ("read_share", "pss_ratio", "rank_weights") for ranks in (1, 2, 4)),
             "load.cold_vs_read.2", "load.cold_vs_read_fsdp.2"},
    "vae": {"vae.speedup2", "vae.of_machine2", "vae.encode_speedup2", "vae.peak_ratio2", "vae.vs_diffusers1"},
    "accelerate": {*(f"accelerate.{name}.of_ideal" for name in caches.CACHES),
                   *(f"accelerate.rainfusion.of_bound.{density}" for density in ("0.43", "0.49", "0.61")),
                   *(f"accelerate.w8a8.{what}" for what in ("relative_error", "linear_time", "linear_bytes")),
                   *(f"accelerate.attention_cache.quality.{what}" for what in ("psnr", "ssim", "prompt_following"))},
}  # fmt: skip
SAMPLE = ("warm",)
MAY_BE_ZERO = ("warm.rss_slope_mb", "warm.weight_opens", *(f"ascend.{mode}_difference" for mode in MODES))


@pytest.mark.parametrize("name", NAMES)
def test_writes_its_figures(request, name, tmp_path):
    if name not in SAMPLE and not request.config.getoption("--all-benchmarks"):
        pytest.skip("one of those that --all-benchmarks runs")
    file = tmp_path / "figures.jsonl"
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["name"] for row in rows} == NAMES[name] and len(rows) == len(NAMES[name])
    for row in rows:
        assert set(row) == {"name", "value", "unit", "better", "baseline", "context"}
        assert row["better"] in ("lower", "higher") and row["name"] in done.stdout
        assert row["context"]["cores"] == len(os.sched_getaffinity(0)) and row["context"]["quick"] is True
        assert row["context"]["device"] == "cpu"
        if row["name"] not in MAY_BE_ZERO:
            assert row["value"] > 0, row
        if row["name"].endswith(("_error", "_difference")):
            assert row["value"] <= row["baseline"], row
            assert row["context"]["measure"]
    opens = [row["value"] for row in rows if row["name"] == "warm.weight_opens"]
    assert opens in ([], [0]), "a warm run read weights"
    if name == "ascend":
        missing = {workload.name for workload in workloads.PUBLISHED} | {*workloads.NOT_YET, "linear_all_reduce"}
        missing.add("MULTI_STREAM_MEMORY_REUSE")
        assert not [what for what in missing if f"{what}" not in done.stdout], "left out, and nothing said of it"


def test_plans_fit_the_cards():
    """No plan takes more cards than there are, and its name says its degrees."""
    assert list(modes.plans(1)) == ["one"]
    assert set(modes.plans(2)) == {"one", *MODES}
    four = {mode.replace("2", "4") for mode in MODES[1:]} | {"cfg2_ulysses2"}
    assert set(modes.plans(7)) == {"one", *MODES, *four}
    eight = {mode.replace("2", "8") for mode in MODES[1:]} | {"cfg2_ulysses4"}
    assert set(modes.plans(8)) == {"one", *MODES, *four, *eight}
    axes = ("cfg", "ring", "ulysses", "tp")
    for name, plan in modes.plans(16).items():
        degrees = {axis: int(degree) for axis, degree in re.findall(rf"({'|'.join(axes)})(\d)", name)}
        assert [getattr(plan, f"{axis}_degree") for axis in axes] == [degrees.get(axis, 1) for axis in axes]
        assert plan.ranks == math.prod(degrees.values())
        assert (plan.overlap, plan.fsdp) == ("overlap" in name, "fsdp" in name)


FOUND = {"1": (0.5, 20), "2": (0.6, 16), "3": (0.4, 18)}  # seconds a step, GB: by MULTI_STREAM_MEMORY_REUSE


class FakeCards:
    """Ranks on NPUs that are not there: each of their jobs takes what FOUND says."""

    def __init__(self, plan, device, environment):
        assert (plan.ranks, plan.ulysses_degree, plan.fsdp, device) == (4, 4, True, "npu")
        (self.value,) = environment.values()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def sample(self, model, spec, latent, *texts, parallel, warm_up):
        seconds, memory = FOUND[self.value]
        assert parallel.fsdp and warm_up and len(list(Path(model.path).rglob("*.safetensors"))) == 1
        if memory is None:
            raise RuntimeError("NPU out of memory")
        return Result(latent, seconds={"denoise": seconds * spec.steps}, info={"device memory": f"{memory:.2f} GB"})


def test_how_sharded_weights_share_memory_is_measured_for_each_value(monkeypatch):
    monkeypatch.setattr(modes, "Runtime", FakeCards)
    monkeypatch.setattr(modes, "job_for", lambda *_, job=modes.job_for: job("cpu", quick=True))
    failures = Failures()
    rows = {row.name: row for row in modes.memory_reuse("npu", 6, True, failures)}
    assert {name: row.value for name, row in rows.items()} == pytest.approx(
        {"ascend.fsdp_reuse2_time": 0.6 / 0.4, "ascend.fsdp_reuse2_memory": 16 / 18}
    )
    assert rows["ascend.fsdp_reuse2_memory"].holds and not rows["ascend.fsdp_reuse2_time"].holds
    for row in rows.values():
        assert row.context["step_s"] == pytest.approx({value: seconds for value, (seconds, _) in FOUND.items()})
        assert row.context["memory_gb"] == {value: memory for value, (_, memory) in FOUND.items()}
    monkeypatch.setitem(FOUND, "3", (0.4, None))
    assert not list(modes.memory_reuse("npu", 6, True, failures)) and failures.names == ["MULTI_STREAM_MEMORY_REUSE=3"]


@pytest.mark.parametrize("kind, cards", [("cpu", 2), ("cuda", 8), ("npu", 1)])
def test_elsewhere_it_is_left_out(kind, cards, capsys):
    assert not list(modes.memory_reuse(kind, cards, True, Failures()))
    assert capsys.readouterr().out == "MULTI_STREAM_MEMORY_REUSE with fsdp: left out: there are no two NPUs\n"


class Wrong(PlainOperators):
    """Forgets the gate, and overflows."""

    def gated_add(self, x, update, gate):
        return x + update

    def gelu(self, x):
        return x / 0


def test_a_wrong_operator_is_seen(capsys):
    bench = operators.Bench(torch.device("cpu"), torch.bfloat16, operators.TINY, operators.TINY, quick=True)
    failures = Failures()
    measured = {}
    for name in ("gated_add", "gelu", "rotary"):
        measured |= {row.name: row for row in bench.rows(operators.OTHERS[name], {name: Wrong()}, failures)}
    assert not measured["ascend.gated_add_error"].holds and measured["ascend.rotary_error"].holds
    assert failures.names == ["gelu"] and "gelu: failed: ValueError: the output has NaN" in capsys.readouterr().out


TINY = workloads.Workload("tiny", "tiny_wan", VideoSize(width=64, height=64, num_frames=5), SampleSpec(steps=2),
                          (1, 1, 1), 0.001, "nobody's")  # fmt: skip


def test_a_workload_is_run_as_it_is_described():
    row = workloads.run(TINY, "cpu", ROOT / "assets")
    assert row.name == "ascend.tiny_s" and row.baseline == 0.001 and not row.holds
    assert row.value == pytest.approx(sum(row.context["seconds"].values()))
    assert set(row.context["seconds"]) == {"encode", "denoise", "decode"} and min(row.context["seconds"].values()) > 0
    assert row.context["device"] == "cpu" and row.context["source"] == "nobody's" and row.context["steps"] == 2


@pytest.mark.parametrize("changes, why", [
    ({"kind": "cpu"}, "a CPU"), ({"quick": True}, "--quick"), ({"cards": 7}, "takes 8 cards, and 7"),
    ({"models": None}, "--models DIR"), ({}, "Wan2.2-T2V-A14B-Diffusers is not a diffusers folder"),
])  # fmt: skip
def test_a_workload_that_cannot_be_run_is_left_out_with_the_reason(tmp_path, capsys, changes, why):
    options = {"kind": "npu", "cards": 8, "models": tmp_path, "quick": False} | changes
    failures = Failures()
    assert not list(workloads.measure(**options, failures=failures)) and not failures.names
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("t2v_a14b_720p_8_cards"))
    assert "435.99 s" in said and why in said


def test_a_failure_is_said_and_the_exit_code_tells(capsys):
    failures = Failures()
    for number in range(2):
        with failures.noted(f"number {number}"):
            1 / number
    assert "number 0: failed: ZeroDivisionError: division by zero" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="number 0; see above"):
        failures.exit_if_any()


def test_models_are_an_option_of_ascend_alone():
    command = [sys.executable, "-m", "benchmarks", "warm", "--models", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "only ascend has --models" in done.stderr


def test_openings_are_seen(tmp_path):
    read, unread = tmp_path / "read", tmp_path / "unread"
    for file in (read, unread):
        file.write_bytes(b"1")
    with Opened([read, unread]) as opened:
        subprocess.run(["cat", str(read)], check=True, capture_output=True)
    assert opened.files() == [read]
    with Opened([read, unread]) as opened:
        pass
    assert opened.files() == []


def test_no_file_to_watch_is_an_error():
    with pytest.raises(ValueError, match="no file"):
        Opened([])
