"""`python -m ascend_runtime compare`: how settings are written, how similarity is measured, and a whole comparison."""

import itertools
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import random_hunyuan
import tiny_llava
import torch
from ascend_runtime import __main__
from ascend_runtime.commands import command_line
from ascend_runtime.specs import AccelerationSpec, AttentionCacheSpec, RainFusionSpec, StepCacheSpec
from ascend_runtime.commands.comparison import command
from ascend_runtime.commands.comparison.similarity import mean_ssim, psnr
from ascend_runtime.commands.comparison.pictures import plot
from ascend_runtime.commands.comparison.settings import settings_of
from ascend_runtime.commands.comparison.table import ResultRow, markdown
from ascend_runtime.specs.presets import chosen
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import gaussian_filter

KINDS = ("json", "md", "mp4", "png")
MODEL = Path(__file__).resolve().parents[2] / "assets" / "tiny_wan"


def only(text: str) -> AccelerationSpec:
    (setting,) = settings_of(text)
    assert setting.name == text
    return setting.spec


def test_settings():
    assert only("attention_cache=fast") == AccelerationSpec(attention_cache=chosen("attention_cache", "fast"))
    assert only("attention_cache:ratio=1.3") == AccelerationSpec(attention_cache=AttentionCacheSpec(ratio=1.3))
    assert only("step_cache=fast:method=taylorseer,last_steps=2").step_cache == chosen(
        "step_cache", "fast", method="taylorseer", last_steps=2
    )
    assert only("step_cache:method=fbcache,threshold=0.05+rainfusion:sparsity=0.5,start=3") == AccelerationSpec(
        step_cache=StepCacheSpec(method="fbcache", threshold=0.05), rainfusion=RainFusionSpec(sparsity=0.5, start=3)
    )


def test_a_sweep():
    swept = settings_of("block_cache:interval=2/4,first_block=1+rainfusion:version=v2/v3")
    assert [setting.name for setting in swept] == [
        f"block_cache:interval={interval},first_block=1+rainfusion:version={version}"
        for interval in (2, 4) for version in ("v2", "v3")
    ]  # fmt: skip
    assert {(one.spec.block_cache.interval, one.spec.rainfusion.version) for one in swept} == {
        (2, "v2"), (2, "v3"), (4, "v2"), (4, "v3")
    }  # fmt: skip


@pytest.mark.parametrize("text, says", [
    ("teacache", "no accelerator 'teacache'; it can be one of attention_cache, block_cache"),
    ("attention_cache=best", "it can be one of quality, balanced, fast"),
    ("attention_cache:ration=2", "There is no field ration; the fields are start, end"),
    ("attention_cache:interval=two", "interval is 'two'; give a whole number"),
    ("attention_cache:ratio", "'ratio' is not of the form name=value"),
    ("attention_cache:start=9,end=3", "end must not come before start"),
    ("attention_cache+step_cache", "attention cache and step cache are given; use only one of them"),
    ("rainfusion+rainfusion=fast", "rainfusion is given twice"),
    ("attention_cache,interval=2", "is not a valid setting. Examples: attention_cache=fast"),
    ("", "is not a valid setting"),
])  # fmt: skip
def test_what_is_no_setting_is_refused(text, says):
    with pytest.raises(ValueError) as caught:
        settings_of(text)
    assert says in str(caught.value) and str(caught.value).startswith(f"--setting {text}: ")


@pytest.fixture(scope="module")
def two_videos():
    """[T,H,W,3] in 0..1, the second with noise."""
    generator = torch.Generator().manual_seed(1)
    one = torch.rand(3, 32, 40, 3, generator=generator)
    return one, (one + 0.1 * torch.randn(one.shape, generator=generator)).clamp(0, 1)


def test_psnr_and_ssim_of_what_is_equal(two_videos):
    assert psnr(two_videos[0], two_videos[0]) == math.inf
    assert mean_ssim(two_videos[0], two_videos[0]) == pytest.approx(1, abs=1e-6)


def test_psnr(two_videos):
    one, other = (video.numpy() for video in two_videos)
    assert psnr(*two_videos) == pytest.approx(10 * np.log10(1 / np.mean((one - other) ** 2)), abs=1e-4)


def test_ssim_is_that_of_its_paper(two_videos):
    """By scipy: Wang et al. 2004, windows of 11 x 11 with a Gaussian of 1.5, whole windows alone."""
    values = []
    for one, other in zip(*(video.double().numpy() for video in two_videos)):
        for x, y in zip(np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)):
            blurred = [gaussian_filter(part, 1.5, radius=5)[5:-5, 5:-5] for part in (x, y, x * x, y * y, x * y)]
            mx, my, xx, yy, xy = blurred
            similar = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
            values.append(np.mean(similar / ((mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4))))
    assert mean_ssim(*two_videos) == pytest.approx(np.mean(values), abs=1e-5)
    assert np.mean(values) < 0.99


def test_the_table_says_what_was_refused():
    rows = [
        ResultRow("plain", 2.0, 0.1, 1.0, 1.0, math.inf, 1.0, 1.0, 0.0),
        ResultRow("rainfusion", refused="There is a ring."),
    ]
    table = markdown(rows)
    assert "equal" in table and "rainfusion was rejected: There is a ring." in table
    assert rows[0].facts() | {"equal": True, "psnr": None} == rows[0].facts()
    assert json.loads(json.dumps(rows[1].facts(), allow_nan=False))["refused"] == "There is a ring."


@pytest.fixture
def compare_only(monkeypatch, one_rank, tmp_path):
    """`compare_only(model, options)`: the command's exit status, on a rank that is there already; its files go to the
    folder."""
    monkeypatch.setattr(command, "Runtime", lambda *_: nullcontext(one_rank))

    def run(model: str, *options: str) -> int:
        given = ["compare", model, "--prompt", "a red circle moving right", "--output", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", ["ascend_runtime", *given])
        return __main__.main()

    return run


@pytest.fixture
def compare(compare_only):
    """The same of the embedded model, and a small video."""
    video = ("--size", "64x64", "--frames", "5", "--steps", "6", "--shift", "3")
    return lambda *options: compare_only(str(MODEL), *video, *options)


def test_a_comparison(compare, tmp_path, capsys):
    settings = ("block_cache:interval=2/3,start=1,end=5", "attention_cache:interval=1")
    assert compare("--setting", settings[0], "--setting", settings[1]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"comparison.{kind}" for kind in KINDS]
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert {name: written["given"][name] for name in ("ranks", "device", "parallel", "steps")} == {
        "ranks": 1, "device": "cpu", "parallel": "auto", "steps": 6
    }  # fmt: skip
    plain, two, three, none = written["rows"]
    names = [row["setting"] for row in (plain, two, three, none)]
    assert names[0] == "plain" and names[2] == "block_cache:interval=3,start=1,end=5"
    assert plain["equal"] and none["equal"] and none["saved"] == 0 and none["psnr"] is None
    assert two["psnr"] > three["psnr"] > 5 and 1 > two["ssim"] > three["ssim"] and two["saved"] < three["saved"]
    assert 1 < two["predicted"] < three["predicted"] and two["density"] == 1
    table = (tmp_path / "comparison.md").read_text()
    assert table in capsys.readouterr().out and all(name in table for name in names)
    assert np.asarray(Image.open(tmp_path / "comparison.png").convert("L")).std() > 5
    with av.open(str(tmp_path / "comparison.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape[1] == 2 * 320 + 8, "two columns, enlarged, and what lies between"
    quarters = [frames[2][50:370, :320], frames[2][50:370, 328:], frames[2][420:, :320], frames[2][420:, 328:]]
    differ = [np.abs(quarter.astype(float) - quarters[0]).mean() for quarter in quarters]
    assert differ[3] < 2 and differ[2] > differ[3], "the last is the plain one again"


def test_a_comparison_of_hunyuan_takes_the_models_own_settings(compare_only, tmp_path):
    """A prompt goes through both text encoders; guidance is embedded."""
    model = tiny_llava.save(random_hunyuan.folder(tmp_path / "model"))
    own = {"width": 64, "height": 48, "num_frames": 5, "fps": 12, "steps": 6}
    (model / "ascend_defaults.json").write_text(json.dumps(own))
    settings = "step_cache=fast:method=taylorseer", "rainfusion:sparsity=0"
    assert compare_only(str(model), "--setting", settings[0], "--setting", settings[1]) == 0
    written = json.loads((tmp_path / "comparison.json").read_text())
    expected = {"size": "64x48", "frames": 5, "fps": 12, "steps": 6, "guidance": 1.0, "embedded_guidance": 6.0}
    assert {name: written["given"][name] for name in expected} == expected
    plain, taylor, dense = written["rows"]
    assert plain["equal"] and dense["equal"] and not taylor["equal"] and taylor["saved"] > 0.2
    given = ("--setting", settings[1], "--embedded-guidance", "1", "--output", str(tmp_path / "other"))
    assert compare_only(str(model), *given) == 0
    assert json.loads((tmp_path / "other" / "comparison.json").read_text())["given"]["embedded_guidance"] == 1


def test_the_plot_names_each_point_and_no_name_covers_another(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    settings = ["attention_cache:interval=1", "block_cache:interval=2,start=1,end=5", "block_cache:interval=3", "x"]
    values = enumerate(zip(settings, (math.inf, 27.1, 27.0, 20.0)))
    made = [ResultRow(name, 1.0, 0.1, 1.0 + (number > 0) / 3, 1.0, psnr) for number, (name, psnr) in values]
    rows = [ResultRow("plain", 2.0, 0.1, 1.0, 1.0, math.inf), *made, ResultRow("no", refused="why")]
    plot(rows, tmp_path / "comparison.png")
    (axes,) = figures[0].axes
    texts = {text.get_text().replace("\n", ""): text.get_window_extent() for text in axes.texts}
    assert set(texts) == {"plain", "equal", *settings} and len(axes.collections) == 5
    boxes = [box for name, box in texts.items() if name != "equal"]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_what_one_setting_is_refused_for_leaves_the_others(compare, tmp_path):
    assert compare("--setting", "attention_cache:ratio=9", "--setting", "block_cache=fast", "--repeats", "2") == 1
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert rows[1]["refused"].startswith("ratio is 9.0, but attention is") and rows[2]["refused"] is None


@pytest.mark.parametrize("options, says", [
    (("--setting", "teacache"), "There is no accelerator 'teacache'"),
    (("--setting", "rainfusion", "--size", "64"), "give WIDTHxHEIGHT"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(compare, tmp_path, capsys, options, says):
    """The rest of the kind is in test_commands.py."""
    assert compare(*options) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_has_to_be_installed_is_named(compare, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name == "matplotlib" else SimpleNamespace())
    assert compare("--setting", "rainfusion") == 2
    assert "compare needs matplotlib, which this Python lacks. Run: pip install matplotlib" in capsys.readouterr().err
