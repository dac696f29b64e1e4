"""The benchmarks run, and write the figures that they promise; what the figures are is not tested here."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from ascend_runtime import Conditioning, SampleSpec, VideoSize
from ascend_runtime.client.submission import Result
from ascend_runtime.ops import PlainOperators
from benchmarks import caches, report
from benchmarks.ascend import cases, machine, modes, operators, published, vae_dtypes, workloads
from benchmarks.ascend.markdown import markdown
from benchmarks.opens import Opened
from benchmarks.report import Note, Notes, Row
from msgspec import structs

ROOT = Path(__file__).resolve().parents[2]
TRANSPORT = ["transport.null_ms", "transport.request_ms", "transport.frames_s"]
PEERS = ["socket", "ray"]
OPERATORS = ["attention_plain", "cross_attention_plain", *cases.OTHERS,
             *(name for name, _ in cases.QUANTIZED.values())]  # fmt: skip
MODES = ["cfg2", "ulysses2", "ulysses2_overlap", "ulysses2_fsdp", "ring2", "ring2_gather", "tp2"]
OF_HUNYUAN = [f"hunyuan_{mode}" for mode in ("ulysses2", "ring2", "tp2")]
HUNYUAN_DENSITIES = ("0.59", "0.66", "0.74")
NAMES = {
    "transport": {*TRANSPORT, *(f"{name}_vs_{peer}" for name in TRANSPORT for peer in PEERS)},
    "transport --hosts": {"transport.hosts.null_over_ping_ms", "transport.hosts.frames_share",
                          "transport.hosts.request_share"},
    "warm": {"warm.cold_start_s", "warm.late_over_early", "warm.rss_slope_mb", "warm.weight_opens"},
    "ascend": {*(f"ascend.{name}_{what}" for name in OPERATORS for what in ("error", "time")),
               *(f"ascend.vae_{dtype}_psnr" for dtype in vae_dtypes.LEAST_PSNR),
               *(f"ascend.vae_{dtype}_time" for dtype in ("bfloat16", "float32_strict")),
               *(f"ascend.{mode}_{what}" for mode in MODES + OF_HUNYUAN for what in ("speedup", "difference"))},
    "scaling": {*(f"scaling.{mode}2" for mode in ("ulysses", "ulysses_overlap", "ring", "ring_gather", "cfg")),
                "scaling.pipeline1_vs_diffusers", "scaling.pipeline2_vs_diffusers"},
    "load": {*(f"load.{what}.{ranks}" for what in ("read_share", "pss_ratio", "rank_weights") for ranks in (1, 2, 4)),
             "load.cold_vs_read.2", "load.cold_vs_read_fsdp.2"},
    "vae": {"vae.speedup2", "vae.of_machine2", "vae.encode_speedup2", "vae.peak_ratio2", "vae.vs_diffusers1",
            "vae.bf16_psnr", "vae.bf16_psnr_npu", "vae.hunyuan_video_bf16_psnr", "vae.hunyuan_video_bf16_psnr_npu"},
    "plan": {"plan.median_off", "plan.worst_off", "plan.chosen_near_best"},
    "stock": {"stock.call_over_ping_ms", "stock.bytes_of_a_step", "stock.graph_over_ours"},
    "accelerate": {*(f"accelerate.{name}.of_ideal" for name in caches.CACHES),
                   *(f"accelerate.rainfusion.of_bound.{density}" for density in ("0.43", "0.49", "0.61")),
                   *(f"accelerate.w8a8.{what}" for what in ("relative_error", "linear_time", "linear_bytes")),
                   *(f"accelerate.attention_cache.quality.{what}" for what in ("psnr", "ssim", "prompt_following"))},
    "accelerate --family hunyuan_video": {
        *(f"accelerate.hunyuan_video.{name}.of_ideal" for name in caches.CACHES),
        *(f"accelerate.hunyuan_video.rainfusion.of_bound.{density}" for density in HUNYUAN_DENSITIES)},
}  # fmt: skip
SAMPLE = ("warm",)
MAY_BE_ZERO = ("warm.rss_slope_mb", "warm.weight_opens", "plan.chosen_near_best",
               *(f"ascend.{mode}_difference" for mode in MODES + OF_HUNYUAN))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_writes_its_figures(request, name, tmp_path):
    if name not in SAMPLE and not request.config.getoption("--all-benchmarks"):
        pytest.skip("one of those that --all-benchmarks runs")
    file = tmp_path / "figures.jsonl"
    command = [sys.executable, "-m", "benchmarks", *name.split(), "--quick", "--json", str(file)]
    if name == "ascend":
        command += ["--report", str(tmp_path / "report.md")]
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
        text = (tmp_path / "report.md").read_text()
        assert text in done.stdout and all(f"| {row['name']} |" in text for row in rows)
        left_out = {workload.name for workload in published.PUBLISHED} | {*published.LEFT_OUT, *cases.LEFT_OUT}
        left_out.add(modes.REUSE)
        assert not [what for what in left_out if what not in text], "left out, and nothing said of it"


def test_plans_fit_the_cards():
    """No plan takes more cards than there are, and its name says its degrees."""
    assert list(modes.plans(1)) == ["one"]
    assert set(modes.plans(2)) == {"one", *MODES}
    assert set(modes.unguided(modes.plans(2))) == {"one", "ulysses2", "ring2", "tp2"}
    four = {mode.replace("2", "4") for mode in MODES[1:]} | {"cfg2_ulysses2"}
    assert set(modes.plans(7)) == {"one", *MODES, *four}
    eight = {mode.replace("2", "8") for mode in MODES[1:]} | {"cfg2_ulysses4"}
    assert set(modes.plans(8)) == {"one", *MODES, *four, *eight}
    axes = ("cfg", "ring", "ulysses", "tp")
    fused = {f"tp{degree}{modes.FUSED}" for degree in modes.DEGREES}
    assert set(modes.plans(8, fused=True)) == set(modes.plans(8)) | fused
    for name, plan in modes.plans(16, fused=True).items():
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

    def sample(self, model, spec, latent, *texts, parallel, warm_up, operators):
        seconds, memory = FOUND[self.value]
        assert parallel.fsdp and warm_up and len(list(Path(model.path).rglob("*.safetensors"))) == 1
        if memory is None:
            raise RuntimeError("NPU out of memory")
        return Result(latent, seconds={"denoise": seconds * spec.steps}, info={"device memory": f"{memory:.2f} GB"})


def test_how_sharded_weights_share_memory_is_measured_for_each_value(monkeypatch):
    monkeypatch.setattr(modes, "Runtime", FakeCards)
    monkeypatch.setattr(modes, "job_for", lambda *_, job=modes.job_for: job("cpu", quick=True))
    notes = Notes()
    rows = {row.name: row for row in modes.memory_reuse("npu", 6, True, notes)}
    assert {name: row.value for name, row in rows.items()} == pytest.approx(
        {"ascend.fsdp_reuse2_time": 0.6 / 0.4, "ascend.fsdp_reuse2_memory": 16 / 18}
    )
    assert rows["ascend.fsdp_reuse2_memory"].holds and not rows["ascend.fsdp_reuse2_time"].holds
    for row in rows.values():
        assert row.context["step_s"] == pytest.approx({value: seconds for value, (seconds, _) in FOUND.items()})
        assert row.context["memory_gb"] == {value: memory for value, (_, memory) in FOUND.items()}
    monkeypatch.setitem(FOUND, "3", (0.4, None))
    assert not list(modes.memory_reuse("npu", 6, True, notes)) and notes.failures == ["MULTI_STREAM_MEMORY_REUSE=3"]


@pytest.mark.parametrize("kind, cards", [("cpu", 2), ("cuda", 8), ("npu", 1)])
def test_elsewhere_it_is_left_out(kind, cards, capsys):
    assert not list(modes.memory_reuse(kind, cards, True, Notes()))
    assert capsys.readouterr().out == "MULTI_STREAM_MEMORY_REUSE with fsdp: left out: there are no two NPUs\n"


# Methods that are no operators: checks, and tables that are made once a video or a plan; `modulation` is an addition.
NO_OPERATORS = {"check_sparse", "sparse_pattern", "rotary_table", "modulation"}


def test_every_operator_is_measured_or_left_out_by_name():
    methods = {name for name, value in vars(PlainOperators).items() if callable(value) and not name.startswith("_")}
    measured = {"attention", *cases.OTHERS, *(name for name, _ in cases.QUANTIZED.values())}
    assert methods - NO_OPERATORS == (measured | set(cases.LEFT_OUT)) & methods
    assert set(cases.LEFT_OUT) <= methods and not measured & set(cases.LEFT_OUT)


class Wrong(PlainOperators):
    """Forgets the gate, and overflows."""

    def gated_add(self, x, update, gate):
        return x + update

    def gelu(self, x):
        return x / 0


def test_a_wrong_operator_is_seen(capsys):
    bench = operators.Bench(torch.device("cpu"), torch.bfloat16, PlainOperators(), cases.TINY, cases.TINY,
                            quick=True)  # fmt: skip
    notes = Notes()
    measured = {}
    for name in ("gated_add", "gelu", "rotary"):
        measured |= {row.name: row for row in bench.rows(cases.OTHERS[name], {name: Wrong()}, notes)}
    assert not measured["ascend.gated_add_error"].holds and measured["ascend.rotary_error"].holds
    assert notes.failures == ["gelu"] and "gelu: failed: ValueError: the output has NaN" in capsys.readouterr().out


A2 = machine.Cards(kind="npu", count=8, name="Ascend910B3", line="a2", gibibytes=64)
SMALL = published.Workload(name="small", folder="t2v", task="t2v", size=VideoSize(width=64, height=64, num_frames=5),
                           sample=SampleSpec(steps=2, guidance_scale=3.0), plan=(1, 1, 1), card="a2", seconds=0.001,
                           source="nobody's")  # fmt: skip


def test_a_workload_is_run_as_it_is_described(tmp_path):
    shutil.copytree(ROOT / "assets" / "tiny_wan", tmp_path / "t2v")
    row = workloads.run(SMALL, machine.Cards(kind="cpu", count=0), tmp_path)
    assert row.name == "ascend.small_s" and row.baseline == 0.001 and not row.holds
    seconds = row.context["seconds"]
    assert list(seconds) == ["text", "denoise", "decode"] and min(seconds.values()) > 0
    assert row.value == pytest.approx(sum(seconds.values()))
    assert row.context["device"] == "cpu" and row.context["source"] == "nobody's" and row.context["steps"] == 2
    assert row.verdict == "not compared" and "published for A2" in row.context["not_compared"]


@pytest.mark.parametrize("task, model", [("i2v", "wan 2.2"), ("ti2v", "ti2v")])
def test_an_image_begins_the_video(tmp_path, one_rank, task, model):
    tiny_models.save(tiny_models.image_pipeline(model), tmp_path)
    maker = workloads.Maker(one_rank, dataclasses.replace(SMALL, task=task), str(tmp_path))
    maker.warm_up()
    assert list(maker.make()) == ["text", "image", "denoise", "decode"]
    latent, (positive, negative), mask = maker._inputs([Conditioning(text=torch.zeros(1, 3, 8))] * 2)
    if task == "ti2v":
        known = one_rank.encode_video(maker.vae, workloads.start_image(SMALL.size)[None]).tensor
        assert torch.equal(latent[:, :, :1], known) and positive.concat_latent is None
        assert mask.shape[1:] == latent[:, :1].shape[1:] and mask[:, :, 0].max() == 0 and mask[:, :, 1:].min() == 1
    else:
        assert mask is None and latent.shape == positive.concat_latent.shape == negative.concat_latent.shape
        known = positive.concat_mask
        assert known.shape[1] == 4 and known[:, :, 0].max() == 0 and known[:, :, 1:].min() == 1


def test_the_start_image_has_a_disc_on_a_field():
    image = workloads.start_image(VideoSize(width=64, height=48, num_frames=5))
    assert image.shape == (48, 64, 3) and image.min() == 0 and image.max() == 1
    assert image[24, 32].tolist() == [1, 0, 0] and image[0, 63].tolist() == [0, 0, 1]


def test_published_workloads_fit_their_models():
    assert len({workload.name for workload in published.PUBLISHED}) == len(published.PUBLISHED)
    for workload in published.PUBLISHED:
        assert workload.parallel.ranks == math.prod(workload.plan) and workload.task in ("t2v", "i2v", "ti2v")
        assert ("TI2V" in workload.folder) == (workload.task == "ti2v")
        assert ("-I2V-" in workload.folder) == (workload.task == "i2v")
        multiple = 32 if workload.task == "ti2v" else 16
        assert workload.size.width % multiple == workload.size.height % multiple == 0
        heads = 24 if "5B" in workload.folder or "Hunyuan" in workload.folder else 40
        padded = "ulysses5" in workload.name  # published for HunyuanVideo, whose heads Ulysses pads there
        assert (heads % (workload.plan[1] * workload.plan[2]) != 0) == padded


def test_mindies_speed_ups_are_over_a_single_card_with_cache_and_sparse_attention():
    """So its seconds on several cards are not those of full attention."""
    several = [workload for workload in published.MINDIE_21 if workload.speed_up]
    assert len(several) == 11 and {workload.differs for workload in several} == {published.CACHED}
    assert [workload.seconds * workload.speed_up for workload in several] == pytest.approx([560.8] * 11, rel=5e-3)


@pytest.mark.parametrize("changes, why", [
    ({"kind": "cpu", "count": 0}, "a CPU"), ({"count": 7}, "takes 8 cards, and 7"),
    ({"kind": "cuda"}, "published for A2"), ({}, "Wan2.2-T2V-A14B-Diffusers is not a diffusers folder"),
])  # fmt: skip
def test_a_workload_that_cannot_be_run_is_left_out_with_the_reason(tmp_path, changes, why):
    notes, cards = Notes(), structs.replace(A2, **changes)
    assert not list(workloads.measure(workloads.chosen("t2v_a14b_720p_8"), cards, tmp_path, False, notes))
    assert not notes.failures and notes.found[-1].what == "t2v_a14b_720p_8_cards (435.99 s)"
    assert why in notes.found[-1].why


def test_without_models_and_when_quick_no_workload_is_run(tmp_path):
    for models, quick, why in ((None, False, "--models DIR"), (tmp_path, True, "--quick")):
        notes = Notes()
        assert not list(workloads.measure(workloads.chosen(None), A2, models, quick, notes))
        assert sum(why in note.why for note in notes.found) > 10


def test_workloads_are_chosen_by_a_part_of_their_names():
    assert {workload.folder for workload in workloads.chosen("ti2v_5b")} == {"Wan2.2-TI2V-5B-Diffusers"}
    seconds = [workload.seconds for workload in workloads.chosen(None)]
    assert seconds == sorted(seconds) and len(seconds) == len(published.PUBLISHED)
    with pytest.raises(SystemExit, match="no published workload.*\n(.*\n)*t2v_a14b_720p_8_cards"):
        workloads.chosen("s2v")


def test_what_other_cards_published_is_not_compared():
    a2, h100 = (next(w for w in published.PUBLISHED if w.card == card and not w.differs) for card in ("a2", "H100"))
    hopper = machine.Cards(kind="cuda", count=8, name="NVIDIA H100 80GB HBM3")
    assert not workloads._not_comparable(a2, A2) and not workloads._not_comparable(h100, hopper)
    h20, h200 = dataclasses.replace(h100, card="H20"), structs.replace(hopper, name="NVIDIA H200")
    assert workloads._not_comparable(h20, h200) == "published for H20, measured on NVIDIA H200"
    assert not workloads._not_comparable(h20, structs.replace(hopper, name="NVIDIA H20-3e"))
    why = workloads._not_comparable(a2, structs.replace(A2, line="a3", name="Ascend910_9391"))
    assert why == "published for A2, measured on Ascend910_9391"
    assert "without both" in workloads._not_comparable(published.MINDIE_21[1], A2)


def test_a_failure_is_noted_and_the_exit_code_is_not_zero(capsys, tmp_path):
    file = tmp_path / "notes.jsonl"
    notes = Notes(file)
    for number in range(2):
        with notes.noted(f"number {number}"):
            1 / number
    notes.leave_out("number 2", "it is large")
    assert "number 0: failed: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert [report.from_json(line, Note) for line in file.read_text().splitlines()] == notes.found
    assert [note.failed for note in notes.found] == [True, False]
    with pytest.raises(SystemExit, match="number 0; see above"):
        notes.exit_if_any_failed()


def test_a_report_names_no_host_user_or_folder(monkeypatch):
    monkeypatch.setattr(machine.platform, "node", lambda: "box17")
    monkeypatch.setattr(machine.Path, "home", lambda: Path("/data/a user"))
    notes = Notes()
    why = ("RankDied: box17 at 10.1.2.3:29500 cannot read /home/zhang/models/Wan/config.json or /data/a user/x; "
           "/usr/local/Ascend/cann/lib64/libhccl.so is there, see modelers.cn/models/MindIE/Wan2.2")  # fmt: skip
    for name in ("one", "other"):
        notes.add(Note(what=name, why=why, failed=True))
    row = Row(name="ascend.x_s", value=3.0, unit="s", better="lower", baseline=2.0, context={"seconds": {"text": 1.5}})
    loose = structs.replace(row, name="ascend.y_s", context={"not_compared": "published on | others"})
    text = markdown({"cards": "8 x Ascend910B3", "driver": "25.0.1.1", "CANN": ""}, [row, loose], notes)
    assert "| driver | 25.0.1.1 |" in text and "| CANN |" not in text
    assert "| ascend.x_s | 3 s | <= 2 | 1.5 | missed | seconds: text 1.5 |" in text
    assert "| ascend.y_s | 3 s | <= 2 | - | not compared | published on / others |" in text
    assert text.count("one, other") == 1 and "## Left out\n\nNothing." in text
    assert "RankDied: HOST at ADDRESS:29500 cannot read .../config.json or ~/x; " in text
    assert "/usr/local/Ascend/cann/lib64/libhccl.so is there, see modelers.cn/models/MindIE/Wan2.2" in text


def test_frames_are_compared_by_their_psnr():
    exact = torch.full((2, 2, 2, 3), 0.5)
    assert vae_dtypes.psnr(exact + 0.01, exact) == pytest.approx(40, abs=1e-3)
    assert vae_dtypes.psnr(exact, exact) == pytest.approx(150)


def test_the_machine_is_described(monkeypatch):
    facts = machine.describe(A2, {"ALGO": "1", "HCCL_IF_IP": "10.0.0.1", "SECRET": "x"})
    assert facts["cards"] == "8 x Ascend910B3, 64 GiB each (A2)" and facts["variables"] == "ALGO=1"
    assert facts["torch"] == str(torch.__version__) and re.search(" cores, bfloat16 .*(yes|no)", facts["processor"])
    unknown = machine.find_cards("npu", 2)  # there is no torch_npu
    assert str(unknown).startswith("2 x not known: ") and unknown.name == ""
    arm = "processor\t: 0\nCPU implementer\t: 0x48\nCPU part\t: 0xd01\n"
    monkeypatch.setattr(machine, "CPU", type("File", (), {"read_text": staticmethod(lambda: arm)}))
    assert machine.describe(A2)["processor"].startswith("CPU implementer 0x48, CPU part 0xd01, ")


def test_options_of_ascend_are_refused_for_others():
    command = [sys.executable, "-m", "benchmarks", "warm", "--only", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "only ascend has --models, --only and --report" in done.stderr


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
