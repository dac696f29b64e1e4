"""The planner's choice: the fastest arrangement that fits, what a user fixes, and the command that shows it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ascend_runtime import DiffusionModelSpec, ParallelSpec, TextEncoderSpec, VaeSpec, VideoSize
from ascend_runtime.__main__ import main
from ascend_runtime.planner import choice, memory, models, rates, videos
from ascend_runtime.planner.choice import Choice, Fixed
from ascend_runtime.planner.choosing.arrangements import arrangements, open_tiles
from ascend_runtime.planner.facts import Arrangement, Machine, Memory, Prediction
from ascend_runtime.specs.plans import Plan

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "assets" / "tiny_wan")
A2 = Machine("npu", "a2", 8, 60 * 10**9, 10**12, 400 * 2**20)


@pytest.fixture(scope="module")
def tiny():
    return models.read(DiffusionModelSpec(path=TINY), TextEncoderSpec(path=TINY), VaeSpec(path=TINY), "npu")


@pytest.fixture(scope="module")
def video(tiny):
    return videos.video_of(tiny, tiny.defaults.size)


def test_the_facts_of_a_folder_are_those_of_its_files(tiny):
    (expert,) = tiny.experts
    assert set(expert.stored_types) == set(expert.shapes) and set(expert.stored_types.values()) == {"bfloat16"}
    assert expert.stored == sum(file.stat().st_size for file in (Path(TINY) / "transformer").glob("*.safetensors"))
    assert [one.part for one in tiny.encoders] == ["text_encoder"] and tiny.vae.part == "vae"
    assert (tiny.dtype, tiny.vae_dtype) == ("bfloat16", "bfloat16") and tiny.defaults.steps == 20


def test_the_fastest_arrangement_that_fits_is_chosen(tiny, video):
    made = choice.choose(tiny, video, A2, rates.of_card("a2"))
    speeds = [sum(taken for stage, taken in one.seconds.items() if stage != "load") for one in made.fitting]
    assert speeds == pytest.approx(sorted(speeds), rel=2e-3) and len(speeds) > 3 and not made.others
    assert made.chosen is made.fitting[0] and all(choice.fits(one.memory, A2) for one in made.fitting)


@pytest.mark.parametrize("whole, alike, leaves_room", [(58, 1e3, True), (58, 1.0, False), (50, 1e3, False)])
def test_cards_are_not_filled_for_a_few_percent(tiny, video, monkeypatch, whole, alike, leaves_room):
    """whole: GB of a card that whole weights take."""
    monkeypatch.setattr(choice, "AS_FAST", alike)

    def held(model, video, one, machine):
        return Memory({"denoise": {"weights": (10 if one.fsdp else whole) * 10**9}}, {})

    made = choice.choice_of(tiny, video, A2, rates.of_card("a2"), held=held)
    assert made.chosen.arrangement.fsdp == leaves_room == ("it leaves room on the cards" in made.line)
    assert len(made.fitting) == len({id(one) for one in made.fitting}) > 3


def test_what_a_user_fixes_stays_fixed(tiny, video):
    for fixed in (
        Fixed(ParallelSpec(ulysses_degree=4, cfg_degree=2, fsdp=True)), Fixed(ParallelSpec(ring_degree=8)),
        Fixed(ParallelSpec(cfg_degree=1, fsdp=False), encoder="cpu"), Fixed(ParallelSpec(tp_degree=2), tiles="whole"),
    ):  # fmt: skip
        for one in choice.choose(tiny, video, A2, rates.of_card("a2"), fixed).fitting:
            made, wanted = one.arrangement, fixed.parallel
            assert wanted.fsdp in (None, made.fsdp) and fixed.encoder in ("auto", made.encoder)
            for axis in ("cfg", "ring", "ulysses", "tp"):
                assert getattr(wanted, f"{axis}_degree") in (0, getattr(made.plan, axis)), (fixed, made)


def test_degrees_that_do_not_match_the_cards_are_preferences(tiny, video):
    two = replace(A2, ranks=2)
    (plan,) = {one.plan for one in arrangements(tiny, video, two, Fixed(ParallelSpec(ulysses_degree=8)), "whole")}
    assert plan == ParallelSpec(ulysses_degree=8).resolve(2, guided=True)


def test_a_ring_is_left_open_only_where_ulysses_pads_heads():
    wan, hunyuan = models.published("Wan2.1-T2V-1.3B"), models.published("HunyuanVideo")
    of_wan, of_hunyuan = (
        {one.plan.degrees for one in arrangements(model, videos.video_of(model, VideoSize()), replace(A2, ranks=ranks),
                                                  Fixed(), "whole")}
        for model, ranks in ((wan, 8), (hunyuan, 16))
    )  # fmt: skip
    assert of_wan == {(2, 1, 4, 1), (1, 1, 8, 1), (1, 2, 4, 1)}  # 12 heads
    assert of_hunyuan == {(1, 1, 16, 1), (1, 2, 8, 1)}  # 24 heads, no guidance


def test_blended_tiles_are_tried_only_if_no_whole_plane_fits(tiny, video):
    one_card = replace(A2, ranks=1)
    assert open_tiles(tiny, one_card, Fixed()) == ("whole", "published") and open_tiles(tiny, A2, Fixed()) == ("whole",)
    made = choice.choose(tiny, video, one_card, rates.of_card("a2"))
    assert {one.arrangement.tiles for one in made.fitting} == {"whole"} and not made.others
    too_large = Memory({"decode": {"tiles": 10**12}}, {})
    made = choice.choice_of(tiny, video, one_card, rates.of_card("a2"), held=lambda model, video, one, machine: (
        too_large if one.tiles == "whole" else memory.predicted(model, video, one, machine)))  # fmt: skip
    assert {one.arrangement.tiles for one in made.fitting} == {"published"} and "blended tiles" in made.line


def test_on_a_cpu_the_ranks_share_the_host_s_memory():
    taken = Memory({"denoise": {"weights": 3}}, {"frames": 2})
    host = Machine("cpu", "cpu", 2, 5, 8)
    assert choice.fits(taken, host) and not choice.fits(taken, replace(host, host_memory=7))
    assert choice.fits(taken, Machine("npu", "a2", 2, 3, 2)) and not choice.fits(taken, Machine("npu", "a2", 2, 2, 2))


def test_the_line_says_what_was_chosen_why_and_what_it_takes():
    def prediction(arrangement, seconds, device):
        return Prediction(arrangement, {"load": 9.0, "encode": 0.0, "denoise": seconds, "decode": 2.0},
                          Memory({"denoise": {"weights": device}}, {"frames": 10**9}), {}, 0)  # fmt: skip

    fits = prediction(Arrangement(Plan(cfg=2, ulysses=4), fsdp=True, encoder="ranks"), 250, 20 * 10**9)
    slower = prediction(Arrangement(Plan(ulysses=8), fsdp=True, encoder="ranks"), 260, 20 * 10**9)
    fast = prediction(Arrangement(Plan(cfg=2, ulysses=4), encoder="ranks"), 240, 80 * 10**9)
    assert Choice((fits, slower), (fast,), A2, "by published figures of A2, not measured here").line == (
        "CFG 2 x Ulysses 4, FSDP, text encoder on the ranks: the fastest of 2 that fit (CFG 2 x Ulysses 4, text "
        "encoder on the ranks would need 80.0 GB a card). Predicted: 4 min 12 s (4 min 10 s to denoise), 9.0 s to load "
        "first; 20.0 GB of 60.0 GB a card, 1.0 GB of 1000.0 GB of the host; by published figures of A2, not measured "
        "here."
    )


# The command


@pytest.fixture
def planned(monkeypatch, capsys):
    """`planned(*arguments)`: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ascend_runtime", "plan", *arguments])
        try:
            status = main()
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return run


def test_the_command_shows_a_table_and_the_chosen_plan(planned):
    status, out, _ = planned(TINY, "--card", "a2", "--ranks", "4", "--size", "128x64", "--frames", "9")
    assert status == 0
    first, *_ = out.splitlines()
    assert first == "Wan2.1-T2V: 128x64, 9 frames, 20 steps, shift 3, guidance 4"
    rows = [line for line in out.splitlines() if line.endswith("  yes")]
    assert len(rows) > 3 and sum(line.startswith("->") for line in rows) == 1
    assert "\nchosen: " in out and "128 GB for each card is assumed" in out


def test_the_command_s_json_is_complete(planned):
    status, out, _ = planned(TINY, "--card", "h100", "--ranks", "2", "--json", "--parallel", "cfg_degree=2,fsdp=true")
    found = json.loads(out)
    assert status == 0 and found["format"] == 1 and found["chosen"] == 0 and found["line"] and not found["refused"]
    assert {tuple(plan["degrees"].values()) for plan in found["plans"]} == {(2, 1, 1, 1)}
    for plan in found["plans"]:
        assert plan["fsdp"] and plan["fits"] and set(plan["seconds"]) == {"load", "encode", "denoise", "decode"}
        assert plan["device_peak"] == max(sum(parts.values()) for parts in plan["device_bytes"].values())
        assert plan["host_total"] == sum(plan["host_bytes"].values()) and plan["read"] > 0 and "fsdp" in plan["sent"]
    assert found["machine"]["card"] == "h100" and found["video"]["steps"] == 20


def test_the_command_refuses_what_does_not_fit_and_names_what_does(planned):
    given = (TINY, "--card", "a2", "--ranks", "1", "--device-memory", "0.1", "--size", "512x512", "--frames", "81")
    status, out, err = planned(*given)
    assert status == 1 and "error: AV-1210: " in err and "chosen" not in out and "  no: " in out
    status, out, _ = planned(*given, "--json")
    found = json.loads(out)
    assert status == 1 and found["chosen"] is None and found["refused"].startswith("AV-1210: ")
    assert not any(plan["fits"] for plan in found["plans"])
    for size in found["nearest"]:
        nearest = "--size", f"{size['width']}x{size['height']}", "--frames", str(size["frames"])
        assert planned(*given[:7], *nearest)[0] == 0


@pytest.mark.parametrize("arguments, said", [
    (("nothing_here",), "It is no published model either"), ((TINY, "--size", "100x100"), "width is 100"),
    ((TINY, "--host-memory", "0"), "--host-memory is 0"), ((TINY, "--stored", "fp8"), "only for published models"),
    (("HunyuanVideo", "--measure"), "Give a model's folder"), ((TINY, "--parallel", "speed=2"), "speed"),
])  # fmt: skip
def test_invalid_arguments_of_the_command_are_refused(planned, arguments, said):
    status, _, err = planned(*arguments)
    assert status == 2 and said in err
