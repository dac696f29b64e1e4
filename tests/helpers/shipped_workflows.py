"""The workflows that come with the pack: their names, and the prompts that ComfyUI's API takes."""

import json
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = [
    "hunyuan_video_text_to_video",
    "hunyuan_video_v1_image_to_video",
    "hunyuan_video_v2_image_to_video",
    "stock_hunyuan_video_text_to_video",
    "stock_wan2.2_i2v_a14b_image_to_video",
    "stock_wan2.2_t2v_a14b_text_to_video",
    "stock_wan2.2_ti2v_5b_text_to_video",
    "tiny_wan_fast_text_to_video",
    "tiny_wan_text_to_video",
    "wan2.1_flf2v_14b_first_last_frame_to_video",
    "wan2.1_i2v_14b_image_to_video",
    "wan2.1_t2v_1.3b_text_to_video",
    "wan2.1_t2v_14b_text_to_video",
    "wan2.2_i2v_a14b_image_to_video",
    "wan2.2_i2v_a14b_image_to_video_4_steps",
    "wan2.2_t2v_a14b_text_to_video",
    "wan2.2_ti2v_5b_image_to_video",
    "wan2.2_ti2v_5b_text_to_video",
]


def api(name) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
