"""The words of nodes' reports in each language: every text once, with the same places, and none that is never said."""

import itertools
import json
import re
import string
import sys
import types
from pathlib import Path

import pytest
from ascend_runtime.specs.record import HostRecord, JobRecord

ROOT = Path(__file__).resolve().parents[2]
LOCALES = sorted((ROOT / "locales").glob("*/report.json"))
TABLES = {file.parent.name: json.loads(file.read_text()) for file in LOCALES}
AXES = ("cfg_degree", "ring_degree", "ulysses_degree", "tp_degree")
PLANS = [dict(zip(AXES, degrees), fsdp=fsdp)
         for *degrees, fsdp in itertools.product(*[(1, 2)] * 4, (False, True))]  # fmt: skip
FACTS = {
    "accelerators": {"attention_cache": ""}, "steps_reusing": list(range(14)), "mean_density": 0.416,
    "flops_saved": 0.312, "seconds_a_step": [2.1] * 40, "predicted_speed_up": 1.39, "seen_speed_up": 1.364,
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    """nodes.report, imported without ComfyUI: as a package of a parent that imports nothing."""
    before = dict(sys.modules)
    for name, path in (("a_pack", ROOT), ("a_pack.nodes", ROOT / "nodes"), ("a_pack.nodes.metadata", ROOT)):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    sys.modules["a_pack.ascend_runtime"] = sys.modules["ascend_runtime"]
    for name, module in before.items():
        if name.startswith("ascend_runtime."):
            sys.modules[f"a_pack.{name}"] = module
    sys.modules["a_pack.nodes.metadata.kept"] = kept = types.ModuleType("kept")
    sys.modules["a_pack.nodes.metadata"].kept = kept
    sys.modules["comfy_execution"] = types.ModuleType("comfy_execution")
    sys.modules["comfy_execution.utils"] = utils = types.ModuleType("utils")
    utils.get_executing_context = lambda: "the running node"
    kept.before = lambda context, this_run: EARLIER
    from a_pack.nodes import report

    yield report
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def record(kind="denoise", device="npu", ranks=1, plan={}, settings={}, **seconds):
    host = HostRecord(device=device, card="910B", ranks=ranks)
    return JobRecord(kind=kind, parts=[], host=host, plan=plan, settings=settings, seconds=seconds)


EARLIER = [record("encode", load=3.0, encode=1.2), record("encode video", encode=0.7), record(denoise=60.0)]


def places(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def test_every_text_is_in_every_language_with_the_same_places():
    assert len(TABLES) >= 2
    english = TABLES["en"]
    for language, table in TABLES.items():
        assert list(table) == list(english), language
        assert all(places(table[key]) == places(text) for key, text in english.items()), language
        assert len(set(table.values())) >= len(table) - 4, "a text is there several times"  # cards and processes
    letters = re.compile(r"[a-zA-Z]{2,}")
    words = {word for text in TABLES["zh"].values() for word in letters.findall(re.sub(r"\{\w+\}", "", text))}
    assert words <= {"CPU", "Latent"}


def said(report, language, info={}, own=None, **changes):
    info = {"steps": 40, "guidance": 1.0, "plan": {"predicted": {"denoise": 90.0}, "device_free": 60 * 10**9}, **info}
    own = own or record(ranks=8, plan=PLANS[-2], denoise=84.0, load=20.0, **changes)
    return report.of_sampling(info, own)["ascend_report"][0][language].splitlines()


def test_the_words_of_a_long_video(report):
    info = {"guidance": 4.0, "low-noise guidance": 3.0, "shift": 12.0, "acceleration": FACTS,
            "peak bytes": 41_234_567_890, "machines": ["atlas1", "atlas2"],
            "warnings": ["AV-1609: All frames are the same."]}
    plan = {"cfg_degree": 2, "ulysses_degree": 4, "fsdp": True}
    own = record(ranks=8, plan=plan, settings={"experts": "swap", "solver": "unipc"},
                 **{"load": 20.0, "warm up": 9.0, "denoise": 84.0})  # fmt: skip
    english = "\n".join(said(report, "en", info, own))
    assert english == """\
8 cards share each step: half of them compute the prompt, the others the negative prompt; each half divides the video \
into 4 parts.
Each card keeps a part of the weights, and gets the rest from the others when a layer needs it.
The two experts take turns on the cards; the other one waits in the host's memory.
The ranks were on these machines: atlas1, atlas2.
Settings: cfg 4, low-noise cfg 3, shift 12, unipc.
Took 2 min 58 s: loading 23 s, text 1.2 s, image 0.7 s, warm-up 9.0 s, earlier steps 1 min 0 s, 40 steps 1 min 24 s \
(2.1 s each; predicted 1 min 30 s in all).
AttentionCache: 14 of 40 steps reused earlier results; 31 % less to compute, 1.36 times as fast, 31 s saved.
Memory: 41.2 GB of 60.0 GB on the fullest card.
Warning: AV-1609: All frames are the same."""
    assert "\n".join(said(report, "zh", info, own)) == """\
8 张卡共同计算每一步：一半的卡算正面提示词，另一半算负面提示词；每一半再把视频分成 4 份。
权重分散存放在各张卡上，计算到某一层时再收集。
两个专家轮流占用显存，另一个在主机内存中等待。
参与计算的机器：atlas1，atlas2。
设置：引导系数 4，低噪声引导系数 3，时间步偏移 12，unipc。
用时 2 分 58 秒：加载 23 秒，文本 1.2 秒，图像 0.7 秒，预热 9.0 秒，之前的步 1 分 0 秒，40 步 1 分 24 秒（每步 2.1 秒，预计共 1 分 30 秒）。
AttentionCache：40 步中有 14 步复用了之前的结果，计算量减少 31%，速度为原来的 1.36 倍，节省 31 秒。
显存：占用最多的卡用了 41.2 GB，可用 60.0 GB。
警告：AV-1609: All frames are the same."""


def test_accelerators_that_save_nothing_or_are_not_calibrated_say_so(report):
    def line(**changes):
        return " ".join(said(report, "en", {"acceleration": FACTS | changes})[3:])

    both = {"step_cache": "teacache", "rainfusion": "v2"}
    unknown = {"high_noise": "published", "low_noise": "nothing is known"}
    skipped = "teacache and RainFusion v2: 14 of 40 steps reused earlier results, 58 % of attention left out; 31 %"
    assert skipped in line(accelerators=both, calibration=unknown)
    assert "is not calibrated" in line(accelerators=both, calibration={"high_noise": "nothing is known"})
    assert line(accelerators={"rainfusion": "v2"}, flops_saved=0.0).endswith("nothing saved.")
    assert "but no faster (0.97 times)" in line(seen_speed_up=0.97)
    assert "1.39 times as fast by calculation" in line(seen_speed_up=None)


def test_all_texts_are_said_in_some_case_and_every_plan_has_words(report, monkeypatch):
    """And no place of a text stays empty."""
    used = set()
    words = sys.modules[report.of_sampling.__module__.replace("lines", "words")]

    class Noted(dict):
        def __getitem__(self, key):
            used.add(key)
            return super().__getitem__(key)

    tables = {language: Noted(table) for language, table in TABLES.items()}
    monkeypatch.setattr(words, "texts", tables.__getitem__)
    for device, plan, parts in itertools.product(("npu", "cpu"), PLANS, ({}, {"first step": 4, "end step": 9})):
        ranks = plan["cfg_degree"] * plan["ring_degree"] * plan["ulysses_degree"] * plan["tp_degree"]
        own = record(device=device, ranks=ranks, plan=plan, settings={"experts": "swap"}, denoise=9000.0)
        for predicted in ({}, {"predicted": {"denoise": 1.0}}):
            report.of_sampling({"steps": 20, "guidance": 1.0, "plan": predicted, **parts}, own)
    for changes in ({}, {"flops_saved": 0.0}, {"seen_speed_up": None}, {"seen_speed_up": 0.9},
                    {"accelerators": {"step_cache": "magcache", "rainfusion": "v1"},
                     "calibration": {"": "nothing is known"}}):  # fmt: skip
        said(report, "en", {"acceleration": FACTS | changes, "peak bytes": 1, "history": "missing", "first step": 2,
                            "warm up": 1}, record(**{"warm up": 2.0, "denoise": 3.0}))  # fmt: skip
    report.of_sampling({"steps": 1, "guidance": 1.0, "peak bytes": 5}, record(denoise=1.0))
    said(report, "en", {"distilled": "LightX2V", "low-noise guidance": 1.0, "embedded guidance": 6.0, "shift": 5.0})
    report.of_decoding({}, record("decode", load=1.0, decode=2.0))
    report.of_no_step(3, 3, 4)
    said(report, "en", {"machines": ["atlas1"]})
    monkeypatch.setitem(globals(), "EARLIER", [])
    report.of_decoding({"warnings": ["x"]}, record("decode", decode=0.01))
    assert used == set(TABLES["en"])
