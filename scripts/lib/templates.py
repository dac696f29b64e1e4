"""Takes ComfyUI's own templates that tests run, as JSON files, out of pinned wheels on PyPI, into .cache/templates.

`file(name)` is the path of one, as ComfyUI 0.3.75 brings it; `file(name, newest=True)` of a later form.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from .environment import REPOSITORY, Environment, SetupError, lock, say, step

FOLDER = REPOSITORY / ".cache" / "templates"
SHIPPED, NEWEST = "comfyui-workflow-templates-media-video==0.3.12", "comfyui-workflow-templates-json==0.1.123"
SHA256 = {
    SHIPPED: "6a99577651ab45be9e3ee45bcfd9dc55350b3caa9678648469586021570d2b15",
    NEWEST: "fc321960cfc4f52dddc3ee111f33489b167eb7958028eb5b6a7f3fa8865a385e",
}
NAMES = {  # wheel: templates. 0.3.75 brings the three of Wan 2.1 in a larger wheel, and they are the same there
    SHIPPED: (
        "text_to_video_wan", "image_to_video_wan", "video_wan_ati", "03_video_wan2_2_14B_i2v_subgraphed",
        "video_wan2_2_14B_t2v", "video_wan2_2_14B_i2v", "video_wan2_2_14B_flf2v", "video_wan2_2_14B_fun_control",
        "video_wan2_2_14B_fun_inpaint", "video_wan2_2_5B_ti2v", "video_wan2_2_5B_fun_control",
        "video_wan2_2_5B_fun_inpaint", "hunyuan_video_text_to_video",
    ),
    NEWEST: (
        "wan2.1_flf2v_720_f16", "wan2.1_fun_control", "wan2.1_fun_inp", "video_wan2_2_14B_t2v", "video_wan2_2_14B_i2v",
        "video_wan2_2_14B_flf2v",
    ),
}  # fmt: skip


def file(name, newest=False):
    """The path of a template. Raises FileNotFoundError if it was not fetched."""
    wheel = NEWEST if newest or name not in NAMES[SHIPPED] else SHIPPED
    path = _folder(wheel) / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run `bash scripts/test.sh` once, which fetches ComfyUI's "
                                "templates from PyPI")
    return path


def fetch():
    """Downloads the wheels whose templates are missing."""
    with lock():
        for wheel, names in NAMES.items():
            if all((_folder(wheel) / f"{name}.json").is_file() for name in names):
                continue
            with step(f"taking ComfyUI's templates out of PyPI's {wheel}"), tempfile.TemporaryDirectory() as folder:
                _extract(Environment(REPOSITORY / ".venv").download(wheel, SHA256[wheel], folder), wheel)


def _folder(wheel):
    return FOLDER / wheel.replace("==", "-")


def _extract(file, wheel):
    """Extracts the templates of `wheel` atomically."""
    partial = _folder(wheel).with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with zipfile.ZipFile(file) as archive:
        members = {Path(member).name: member for member in archive.namelist() if member.endswith(".json")}
        for name in NAMES[wheel]:
            (partial / f"{name}.json").write_bytes(archive.read(members[f"{name}.json"]))
    shutil.rmtree(_folder(wheel), ignore_errors=True)
    partial.rename(_folder(wheel))


if __name__ == "__main__":
    try:
        fetch()
    except SetupError as error:
        sys.exit(f"error: {error}")
    say(f"ready: ComfyUI's templates in {FOLDER}")
