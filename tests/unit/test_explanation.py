"""`explain` on files that anyone may have written: bounded, typed, escaped; and what it concludes."""

import json
import struct
from argparse import Namespace

import msgspec
import pytest
from ascend_runtime.commands.command_line import COMMANDS
from ascend_runtime.commands.explanation import command, host, metadata, words
from ascend_runtime.commands.explanation.host import Host, Verdict
from ascend_runtime.hardware.versions import versions
from ascend_runtime.specs.record import (
    DECODE,
    DENOISE,
    ENCODE,
    RECORD_FORMAT,
    KEY,
    FileDigest,
    HostRecord,
    JobRecord,
    LoraRecord,
    PartRecord,
    VideoRecord,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FILE, LORA = FileDigest(size=10, digest="ab"), FileDigest(size=11, digest="cd")
PART = PartRecord(part="transformer", name="a model", digest="0123456789", files=[FILE])
NPU, HALF = (HostRecord(device="npu", card="a2", ranks=ranks) for ranks in (8, 4))
FBCACHE, TEACACHE = ({"step_cache": {"method": method}} for method in ("fbcache", "teacache"))
GRAPH = {
    "1": {"class_type": "AscendTextEncode", "inputs": {"text": "a prompt"}},
    "2": {"class_type": "AscendSampler", "inputs": {"seed": 5, "positive": ["1", 0]}},
}


def job(kind: str = DENOISE, **changes) -> JobRecord:
    return JobRecord(**{"kind": kind, "parts": [PART], "host": NPU, **changes})


def lora(file: FileDigest | None) -> LoraRecord:
    return LoraRecord(file=file, strength=1.0, expert="both", misfits="refuse")


def record(*jobs, **changed) -> VideoRecord:
    return VideoRecord(format=RECORD_FORMAT, versions=versions() | changed, jobs=[*jobs, job(ENCODE), job(DECODE)])


def verdict(made: VideoRecord, graph=GRAPH, **here) -> tuple[Verdict, list[str]]:
    own = {"device": "npu", "card": "a2", "folders": [], "comfyui": None, "seen": {FILE, LORA}}
    found = host.reasons(metadata.Metadata(made, graph), Host(**own | here))
    return host.verdict_of(found), [reason.text for reason in found]


@pytest.fixture
def eight_cards(monkeypatch):
    monkeypatch.setattr(host.devices, "count_visible", lambda kind: 8)


def picture(tmp_path, **entries):
    texts = PngInfo()
    for key, value in entries.items():
        texts.add_text(key, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png", pnginfo=texts)
    return tmp_path / "picture.png"


def explained(file, **changes) -> int:
    return command.run(Namespace(**{"file": str(file), "models": [str(file.parent)], "json": False, **changes}))


def test_the_same_host_makes_the_same_bits(eight_cards):
    assert verdict(record(job())) == (Verdict.BITS, [])


@pytest.mark.parametrize("made, here, expected, why", [
    (record(job(), torch="0.1"), {}, Verdict.ROUNDING, "torch: 0.1 made it"),
    (record(job(), other="1"), {}, Verdict.ROUNDING, "other: 1 made it, here is none"),
    (record(job(), comfyui="0.1"), {"comfyui": "0.2"}, Verdict.ROUNDING, "comfyui: 0.1 made it, here is 0.2"),
    (record(job(host=HALF)), {}, Verdict.ROUNDING, "ranks: 4 made it, here are 8"),
    (record(job()), {"card": "a3"}, Verdict.ROUNDING, "card: a2 made it, here is a3"),
    (record(job()), {"device": "cuda"}, Verdict.ROUNDING, "device: npu made it, here is cuda"),
    (record(job(operators={"attention": "fastest"})), {}, Verdict.ROUNDING, "attention 'fastest'"),
    (record(job(accelerators=FBCACHE), torch="0"), {}, Verdict.ROUNDING, "fbcache compares"),
    (record(job()), {"seen": set()}, Verdict.ANOTHER, "01234567): there is no such file of 10 bytes"),
    (record(job()), {"seen": {FileDigest(size=10, digest="x")}}, Verdict.ANOTHER, "has other content"),
    (record(job(parts=[])), {}, Verdict.UNKNOWN, "denoise: the model's files could not be read"),
    (record(job(loras=[lora(None)])), {}, Verdict.UNKNOWN, "a LoRA"),
    (record(job(loras=[lora(LORA)])), {"seen": {FILE}}, Verdict.ANOTHER, "LoRA cd: there is no such file of 11"),
    (record(), {}, Verdict.UNKNOWN, "no diffusion model"),
    (record(job(accelerators=TEACACHE, calibration={"high_noise": "ab"})), {}, Verdict.ANOTHER, "calibration"),
])  # fmt: skip
def test_what_differs_decides(eight_cards, made, here, expected, why):
    found, texts = verdict(made, **here)
    assert found is expected and any(why in text for text in texts), texts


def test_a_number_of_ranks_that_the_graph_sets_is_the_same_on_a_larger_host(eight_cards):
    made = record(job(host=HALF))
    graph = {**GRAPH, "3": {"class_type": "AscendParallelConfig", "inputs": {"ranks": 4}}}
    assert [text for text in verdict(made, graph)[1] if "4 made it" in text] == []


def test_what_is_taken_for_granted_is_named():
    graph = {**GRAPH, "3": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}},
             "4": {"class_type": "AscendParallelConfig", "inputs": {"cfg_degree": 2, "ulysses_degree": 0}}}  # fmt: skip
    made = record(job(plan={"cfg_degree": 2, "ulysses_degree": 4}))
    inputs, plan = host.notes(metadata.Metadata(made, graph))
    assert inputs.endswith("reads them as inputs: cat.png") and plan.startswith("the graph leaves the plan open")
    graph["4"]["inputs"]["ulysses_degree"] = 4
    assert len(list(host.notes(metadata.Metadata(made, graph)))) == 1


def test_a_file_without_metadata(tmp_path, capsys):
    assert explained(picture(tmp_path, prompt=GRAPH)) == 2
    assert explained(picture(tmp_path, **{KEY: {"format": RECORD_FORMAT, "versions": {}, "jobs": []}})) == 2
    assert "none of them made it" in capsys.readouterr().err


def test_what_it_prints_is_escaped(tmp_path, capsys):
    nasty = "\x1b[31mred\x07\u202e"
    made = record(job(parts=[PartRecord(part=nasty, name=nasty, digest=nasty, files=[])], settings={nasty: nasty}),
                  **{nasty: nasty})  # fmt: skip
    graph = {"1": {"class_type": "AscendTextEncode", "inputs": {"text": nasty}}, "2": GRAPH["2"]}
    file = picture(tmp_path, **{KEY: msgspec.to_builtins(made), "prompt": graph})
    assert explained(file) == 1
    printed = capsys.readouterr().out
    assert "\\x1b[31mred" in printed and not any(one in printed for one in "\x1b\x07\u202e")
    assert explained(file, json=True) == 1
    printed = capsys.readouterr().out
    assert json.loads(printed)["prompt"] == nasty and printed.isascii()


@pytest.mark.parametrize("value, says", [
    ("not JSON", "not valid"), ("[]", "not valid"), ('{"format": 2}', "format 2; this version reads format 1"),
    ('{"format": 1}', "not valid"), ('{"format": 1, "versions": {}, "jobs": [{"kind": 3}]}', "not valid"),
    ("[" * 100_000, "not valid"), (json.dumps({"format": 1, "versions": {"a": "b" * 10_000}, "jobs": []}), "not valid"),
    (json.dumps({"format": 1, "versions": {}, "jobs": [{}] * 1000}), "not valid"),
    (" " * 17_000_000 + "{}", "at most"),
])  # fmt: skip
def test_an_invalid_record_is_refused_by_name(tmp_path, monkeypatch, value, says):
    monkeypatch.setattr(metadata, "_entries", lambda file: [(KEY, value)])
    with pytest.raises(ValueError, match=says):
        metadata.read(tmp_path / "video.mp4")


def test_a_graph_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an entry prompt that is not valid"):
        explained(picture(tmp_path, **{KEY: msgspec.to_builtins(record(job())), "prompt": {"1": {"class_type": 3}}}))


def box(kind: bytes, size: int) -> bytes:
    return struct.pack(">I4s", size, kind)


@pytest.mark.parametrize("content, says", [
    (b"", "is none of these"), (b"#EXTM3U\nfile:///etc/passwd\n", "is none of these"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "its metadata cannot be used"),
    (b"RIFF\0\0\0\0WEBP" + b"\xff" * 40, "its metadata cannot be used"),
    (b"\x1a\x45\xdf\xa3" + b"\xff" * 40, "its metadata cannot be used"),
    (box(b"ftyp", 16) + b"isomiso2" + box(b"moov", 2**31), "has an index of 2,147,483,648 bytes"),
    (box(b"ftyp", 16) + b"isomiso2" + box(b"free", 8) * 10_100, "has more than 10,000 boxes"),
])  # fmt: skip
def test_a_file_that_is_no_video_is_refused_by_name(tmp_path, content, says):
    file = tmp_path / "video.mp4"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        explained(file)
    assert str(file) in str(caught.value)


def test_damaged_pictures_end_in_an_answer_or_a_refusal(tmp_path, rng, capsys):
    whole = picture(tmp_path, **{KEY: msgspec.to_builtins(record(job())), "prompt": GRAPH}).read_bytes()
    for number in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        file = tmp_path / f"{number}.png"
        file.write_bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])
        try:
            assert explained(file) in (0, 1, 2)
        except ValueError as error:
            assert str(file) in str(error)
    assert "Traceback" not in capsys.readouterr().err


def test_each_line_of_a_full_record_is_there():
    full = record(job(
        loras=[LoraRecord(file=LORA, strength=0.5, expert="low_noise", misfits="skip", form="DoRA")], dtype="bfloat16",
        settings={"seed": 3, "steps": 20, "shift": 5.0, "quantization": "w8a8_dynamic"}, size=[81, 480, 832],
        plan={"cfg_degree": 2, "ulysses_degree": 4, "fsdp": True}, operators={"attention": "infer"},
        accelerators={"rainfusion": {"version": "v3"}}, saved={"flops_saved": 0.3}, predicted="20 s", calls=40,
        seconds={"denoise": 12.5},
    ))  # fmt: skip
    text = "\n".join(words.lines(metadata.Metadata(full, GRAPH), [], Verdict.BITS, ["a \x1b note"]))
    for part in ("DoRA, strength 0.5, expert low_noise, digest cd", "seed 3, 20 steps (40 model calls", "shift 5.0",
                 "= 2 x ? x 4 x ?, fsdp True", "rainfusion: version v3", "flops_saved 0.3", "predicted    20 s",
                 "bfloat16, quantization w8a8_dynamic", "attention infer", "denoise 12.50", "8 rank(s), npu a2",
                 "prompt       a prompt", "graph's seed 5", "a \\x1b note"):  # fmt: skip
        assert part in text, part


def test_the_command_checks_its_arguments(tmp_path):
    check = COMMANDS["explain"].check
    with pytest.raises(ValueError, match="is a folder. Give a file"):
        check(Namespace(file=str(tmp_path), models=None))
    with pytest.raises(ValueError, match="does not exist"):
        check(Namespace(file=str(tmp_path / "nothing.mp4"), models=None))
    (tmp_path / "video.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a folder. Give a folder of models"):
        check(Namespace(file=str(tmp_path / "video.mp4"), models=[str(tmp_path / "video.mp4")]))
