"""What a video's metadata say about the jobs that made it. Has no paths, no names of hosts or users, and no prompts.

All fields are bounded, as `python -m ascend_runtime explain` reads them from files that anyone may have written.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

KEY = "ascend_video"  # of the entry in a file's metadata
RECORD_FORMAT = 1
MAX_FILES = 512  # of a component; a distributed checkpoint has one for each rank that wrote it
MAX_JOBS = 256
MAX_NUMBERS = 1001  # sigmas
MAX_NAME, MAX_TEXT, MAX_LINE, MAX_LORAS = 64, 200, 1000, 256
DENOISE, ENCODE, DECODE, ENCODE_VIDEO = "denoise", "encode", "decode", "encode video"  # kinds of jobs

Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
ShortText = Annotated[str, Meta(max_length=MAX_NAME)]
Numbers = Annotated[list[float], Meta(max_length=MAX_NUMBERS)]
SettingValue = bool | int | float | Text | Numbers | None
Settings = Annotated[dict[ShortText, SettingValue], Meta(max_length=64)]


class FileDigest(Struct, frozen=True, kw_only=True):
    """A file's size in bytes, and its digest (checkpoints/digest.py)."""

    size: Count
    digest: ShortText


class PartRecord(Struct, frozen=True, kw_only=True):
    """A network that took part. part: as "transformer" or "vae". name: as which it was recognised. digest: of all its
    files, those that decide about its use included."""

    part: ShortText
    name: Text
    digest: ShortText
    files: Annotated[list[FileDigest], Meta(max_length=MAX_FILES)]


class LoraRecord(Struct, frozen=True, kw_only=True):
    """A LoRA in the weights. file: None if it could not be read any more. form: such as "DoRA of LoKr"; empty if it is
    not known."""

    file: FileDigest | None
    strength: float
    expert: ShortText
    misfits: ShortText
    form: Text = ""


class HostRecord(Struct, frozen=True, kw_only=True):
    """Where a job ran. device: "npu", "cuda" or "cpu". card: its product line or name; a CPU's instructions. threads:
    of each rank, on a CPU."""

    device: ShortText
    card: Text
    ranks: Count
    threads: Count | None = None


class JobRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job of the ranks, or the calls of a sampler outside of the ranks.

    parts: none if a file could not be read any more. settings: of the sampler or of the VAE, the model's own values
    filled in. size: [frames, height, width] of the video. plan: the degrees, and how weights and sequences are
    exchanged. accelerators: the settings of each, and saved: what they saved; calibration: the digest of what a step
    cache read for each expert. predicted: what the planner said before the job. calls: of the network, by a sampler
    outside of the ranks. seconds: by stage.
    """

    kind: ShortText
    parts: Annotated[list[PartRecord], Meta(max_length=8)]
    host: HostRecord
    dtype: ShortText = ""
    loras: Annotated[list[LoraRecord], Meta(max_length=MAX_LORAS)] = []
    settings: Settings = {}
    size: Annotated[list[Count], Meta(max_length=3)] = []
    plan: Settings = {}
    operators: Settings = {}
    accelerators: Annotated[dict[ShortText, Settings], Meta(max_length=8)] = {}
    saved: Settings = {}
    calibration: Annotated[dict[ShortText, ShortText], Meta(max_length=4)] = {}
    predicted: Annotated[str, Meta(max_length=MAX_LINE)] = ""
    calls: Count = 0
    seconds: Annotated[dict[ShortText, float], Meta(max_length=16)] = {}


class VideoRecord(Struct, frozen=True, kw_only=True):
    """The jobs that made a video, in the order of the graph. versions: of the packages, and of ComfyUI."""

    format: int
    versions: Annotated[dict[ShortText, ShortText], Meta(max_length=16)]
    jobs: Annotated[list[JobRecord], Meta(max_length=MAX_JOBS)]
