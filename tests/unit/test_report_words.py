"""What is told of a sampling job, in a line; and the presets that it may have been done with."""

import pytest
from ascend_runtime.models.registry import families
from ascend_runtime.specs import AccelerationSpec
from ascend_runtime.specs.acceleration import METHOD_FIELDS
from ascend_runtime.specs.presets import (
    FIELDS,
    PRESETS,
    SPECS,
    TABLE,
    chosen,
    describe_family,
    describe_presets,
    for_family,
)
from ascend_runtime.acceleration.report import words_of

FACTS = {
    "steps_reusing": list(range(14)), "attentions_reused": 1120, "blocks_skipped": 0, "mean_density": 0.416,
    "flops_saved": 0.312, "seconds_a_step": [2.1] * 40, "predicted_speed_up": 1.39, "seen_speed_up": 1.364,
}  # fmt: skip


def told(accelerators, **changes):
    return words_of({"acceleration": {"accelerators": accelerators, **FACTS, **changes}}, {})


def test_words():
    speed = "31 % of the FLOPs saved; 2.10 s a step; 1.39x predicted, 1.36x measured"
    assert told({"attention_cache": ""}) == f"AttentionCache: 14 of 40 steps reused, {speed}"
    assert told({"rainfusion": "v2"}) == f"RainFusion v2: attention 42 % dense, {speed}"
    both = {"step_cache": "fbcache", "rainfusion": "v3"}
    assert told(both) == f"fbcache and RainFusion v3: 14 of 40 steps reused, attention 42 % dense, {speed}"
    assert told({"block_cache": ""}, seen_speed_up=None).endswith("1.39x predicted, no full step to compare")
    assert told({"block_cache": ""}, flops_saved=0.0).endswith("0 % of the FLOPs saved; 2.10 s a step")
    unknown = told({"step_cache": "teacache"}, calibration={"high_noise": "published", "low_noise": "nothing is known"})
    assert unknown == f"teacache: 14 of 40 steps reused, {speed}; not calibrated for this model"
    assert words_of({"steps": 4}, {"denoise": 1.0}) == "4 steps, 0.250 s a step; nothing skipped"


@pytest.mark.parametrize("kind, method", [(kind, method) for kind, methods in TABLE.items() for method in methods])
def test_every_preset_is_legal_and_listed(kind, method):
    way = {METHOD_FIELDS[kind]: method} if kind in METHOD_FIELDS else {}
    specs = [chosen(kind, preset, **way) for preset in PRESETS]
    assert len(set(specs)) == 3 and all(isinstance(spec, SPECS[kind]) for spec in specs)
    assert all(preset in describe_presets(kind) for preset in PRESETS)


def test_values_replace_those_of_a_preset():
    assert chosen("attention_cache", "fast", interval=9).interval == 9
    assert chosen("attention_cache", "fast", start=3).interval == chosen("attention_cache", "fast").interval


def in_family(name, *choice, **values):
    spec = AccelerationSpec(step_cache=chosen("step_cache", *choice, **values))
    return for_family(spec, families()[name].presets).step_cache


def test_a_family_has_its_own_values_of_presets_and_users_have_the_last_word():
    assert in_family("hunyuan_video", "fast", method="teacache").threshold == 0.15
    assert in_family("wan", "fast", method="teacache").threshold == 0.2
    assert in_family("hunyuan_video", "fast", method="teacache", threshold=0.2).threshold == 0.2
    assert in_family("hunyuan_video", method="teacache").limit == 0.15, "no preset"
    fast = in_family("hunyuan_video", "fast", method="magcache", threshold=0.2)
    assert (fast.threshold, fast.most) == (0.2, 6)
    for family in families().values():
        for method, rows in family.presets.items():
            for preset, own in rows.items():
                assert set(own) < set(FIELDS["step_cache"])
                spec = in_family(family.name, preset, method=method)
                assert {name: getattr(spec, name) for name in own} == own
    assert "teacache: fast (threshold 0.15)" in describe_family(
        families()["hunyuan_video"].presets
    )


@pytest.mark.parametrize("kind, preset, values, says", [
    ("teacache", None, {}, "no accelerator 'teacache'; it can be one of attention_cache"),
    ("rainfusion", "best", {}, "preset of rainfusion is 'best'; it can be one of quality, balanced, fast"),
    ("block_cache", None, {"ratio": 2}, "block_cache has no field ratio; it has start, end"),
])  # fmt: skip
def test_what_is_no_accelerator_is_refused(kind, preset, values, says):
    with pytest.raises(ValueError, match=says):
        chosen(kind, preset, **values)
