"""The command that downloads published models, on a hub of this machine that speaks as Hugging Face and ModelScope do,
fails, and lies."""

import errno
import fcntl
import json
import os
import re
from pathlib import Path

import pytest
from ascend_runtime.commands import templates
from ascend_runtime.commands.command_line import COMMANDS
from ascend_runtime.commands.doctor.surroundings import Space
from ascend_runtime.commands.downloading import command, transfer
from ascend_runtime.commands.downloading.options import published_files, wanted_files
from ascend_runtime.commands.progress import ProgressDisplay
from ascend_runtime.errors import code_of
from ascend_runtime.models.registry import families
from local_hub import SIZE, LocalHub, content

ROOT = Path(__file__).resolve().parents[2]
NAME = "wan2.1-t2v-1.3b"
HUBS = ("huggingface", "modelscope")
SECRET = "hf_" + "s3cret" * 5


@pytest.fixture(scope="module")
def hub():
    with LocalHub(file.path for files in published_files().values() for file in files).serving() as hub:
        yield hub


@pytest.fixture
def get(hub, tmp_path, monkeypatch):
    """`get(names, **arguments)`: runs the command into `tmp_path`; the hub answers truly until a test changes it."""
    hub.__init__(hub.paths)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setattr(transfer, "PAUSE_S", 0.0)

    def run(*names, source="huggingface", **arguments):
        from argparse import ArgumentParser

        parser = ArgumentParser()
        COMMANDS["download"].declare(parser)
        flags = [f"--{name.replace('_', '-')}" for name, on in arguments.items() if on]
        parsed = parser.parse_args([*(names or (NAME,)), "--from", source, "--models", str(tmp_path), *flags])
        COMMANDS["download"].check(parsed)
        return command.run(parsed, ProgressDisplay(every=0.0))

    return run


@pytest.fixture(params=HUBS)
def source(request):
    return request.param


def refused(run, code, *words):
    with pytest.raises(ValueError) as caught:
        run()
    assert code_of(caught.value) == code and SECRET not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []
    return str(caught.value)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(name=NAME):
    return {f"{file.folder}/{file.name}": content(file.path) for file in wanted_files([name])}


def test_all_files_of_a_model_come_into_their_folders(get, source, tmp_path, hub, capsys):
    assert get(source=source) == 0
    assert files_in(tmp_path) == published()
    printed = capsys.readouterr()
    assert "3 files are in" in printed.out and SECRET not in printed.out + printed.err
    hub.asked.clear()
    assert get(source=source) == 0 and hub.transfers() == []  # nothing comes twice


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(get, hub):
    get()
    of_hub = {token for _, path, _, token in hub.asked if not path.startswith("/store/")}
    of_store = {token for _, path, _, token in hub.asked if path.startswith("/store/")}
    assert (of_hub, of_store) == ({f"Bearer {SECRET}"}, {None})
    hub.asked.clear()
    get("wan_2.1_vae.safetensors", "wan2.2_vae.safetensors", source="modelscope")
    assert {token for *_, token in hub.asked} == {None}


def test_a_connection_that_is_lost_is_continued(get, source, tmp_path, hub, rng):
    cuts = sorted(rng.randrange(1, SIZE) for _ in range(3))
    hub.cut = [first - before for before, first in zip([0, *cuts], cuts)]
    get("wan_2.1_vae.safetensors", source=source)
    begins = [wanted for path, wanted in hub.transfers() if path.startswith("/store/") or source == "modelscope"]
    assert begins[0] is None and len(begins) == 4
    begun = [int(re.findall(r"\d+", text)[0]) for text in begins[1:]]
    assert begun == sorted(begun) and 0 < begun[0] and begun[-1] <= cuts[-1]
    assert files_in(tmp_path) == published("wan_2.1_vae.safetensors")


def test_an_interrupted_download_goes_on_in_the_next_run_from_either_hub(get, source, tmp_path, hub, monkeypatch):
    step = ProgressDisplay.step

    def interrupted(self, done, total=None):
        if self._stage.endswith(".safetensors") and done >= transfer.RECEIVED:
            raise KeyboardInterrupt
        step(self, done, total)

    monkeypatch.setattr(ProgressDisplay, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="same command continues"):
        get("wan_2.1_vae.safetensors", source=source)
    (partial,) = (tmp_path / "vae").iterdir()
    there = partial.stat().st_size
    assert partial.name.endswith(".partial") and there >= transfer.RECEIVED
    monkeypatch.setattr(ProgressDisplay, "step", step)
    hub.asked.clear()
    get("wan_2.1_vae.safetensors", source=next(name for name in HUBS if name != source))
    assert {wanted for _, wanted in hub.transfers()} == {f"bytes={there}-"}
    assert files_in(tmp_path) == published("wan_2.1_vae.safetensors")


def test_a_server_without_ranges_sends_the_file_once_more(get, source, tmp_path, hub):
    hub.cut, hub.ranges = [1_200_000], False
    get("wan_2.1_vae.safetensors", source=source)
    assert files_in(tmp_path) == published("wan_2.1_vae.safetensors")


def test_a_wrong_hash_is_refused_and_leaves_nothing(get, source, tmp_path, hub):
    hub.content_of = lambda path: content(path + " changed")
    refused(lambda: get("wan_2.1_vae.safetensors", source=source), "AV-1804", "wan_2.1_vae.safetensors", "SHA-256")
    assert files_in(tmp_path) == {}


def test_damage_of_what_came_before_is_found(get, tmp_path, hub):
    hub.cut = [1_000_000] + [0] * transfer.ATTEMPTS
    refused(lambda: get("wan_2.1_vae.safetensors"), "AV-1801", "again", "modelscope")
    (partial,) = (tmp_path / "vae").iterdir()
    with partial.open("r+b") as file:
        file.write(b"damage")
    hub.cut = []
    refused(lambda: get("wan_2.1_vae.safetensors"), "AV-1804")
    assert get("wan_2.1_vae.safetensors") == 0


@pytest.mark.parametrize("status, code, word", [
    (401, "AV-1803", "access"), (403, "AV-1803", "access"), (404, "AV-1802", "--from"), (500, "AV-1801", "status 500"),
    (429, "AV-1801", "status 429"), (418, "AV-1805", "status 418"),
])  # fmt: skip
def test_an_answer_that_is_an_error_says_what_helps(get, source, tmp_path, hub, status, code, word):
    hub.status = status
    refused(lambda: get(source=source), code, word)
    assert files_in(tmp_path) == {}


def test_a_page_of_a_network_is_no_answer(get, source, hub):
    hub.page = b"<html>Log in</html>"
    refused(lambda: get(source=source), "AV-1805", hub.url)


def test_nobody_listens(get, monkeypatch, source):
    for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(variable, "http://user:password@127.0.0.1:9")
    assert "password" not in refused(lambda: get(source=source), "AV-1801", "refused", "_ENDPOINT")


LIES = {
    "a path for a hash": lambda known: known | {"Sha256": "../../../../tmp/evil"},
    "no hash": lambda known: known | {"Sha256": ""},
    "no size": lambda known: known | {"Size": "much"},
    "a negative size": lambda known: known | {"Size": -5},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_description_that_lies_is_refused(get, source, tmp_path, hub, lie):
    hub.listed = lie
    refused(lambda: get(source=source), "AV-1805")
    assert files_in(tmp_path) == {}


def test_other_paths_in_a_list_are_not_read(get, hub, tmp_path):
    hub.listed = lambda known: known | {"Path": "../" + known["Path"]}
    refused(lambda: get(source="modelscope"), "AV-1802")
    assert files_in(tmp_path) == {}


def test_more_bytes_than_announced_are_refused(get, source, tmp_path, hub):
    hub.content_of = lambda path: content(path) + b"more"
    refused(lambda: get("wan_2.1_vae.safetensors", source=source), "AV-1805", "more than the")
    assert "vae/wan_2.1_vae.safetensors" not in files_in(tmp_path)


def test_another_part_than_asked_for_is_refused(get, source, hub):
    hub.cut, hub.range_sent = [1_200_000], "bytes 0-9/10"
    refused(lambda: get("wan_2.1_vae.safetensors", source=source), "AV-1805", "'bytes 0-9/10'")


def test_a_full_disk_is_refused_before_a_byte_comes(get, hub, monkeypatch):
    monkeypatch.setattr(command, "space_of", lambda place: Space(10**9, SIZE))
    refused(get, "AV-1316", "--models")
    assert hub.transfers() == []


def test_a_disk_that_fills_up_keeps_what_is_there(get, tmp_path, hub, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(lambda: get("wan_2.1_vae.safetensors"), "AV-1316", "goes on")
    hub.asked.clear()
    assert get("wan_2.1_vae.safetensors") == 0 and hub.transfers() == []  # all bytes were there


def test_another_file_of_the_name_stays(get, tmp_path, hub):
    (tmp_path / "vae").mkdir()
    own = tmp_path / "vae" / "wan_2.1_vae.safetensors"
    own.write_bytes(b"my own")
    refused(get, "AV-1804", "6 bytes", "Rename")
    own.write_bytes(bytes(SIZE))
    assert get() == 0  # of the same size
    refused(lambda: get(verify=True), "AV-1804", "SHA-256")
    assert own.read_bytes() == bytes(SIZE)


def test_two_commands_do_not_write_one_file(get, tmp_path, hub):
    from ascend_runtime.commands.downloading.hub import Hub

    (file,) = wanted_files(["wan_2.1_vae.safetensors"])
    (tmp_path / "vae").mkdir()
    partial = transfer.partial_file(tmp_path / "vae" / file.name, Hub("huggingface").describe(file))
    with partial.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another command is downloading"):
            get("wan_2.1_vae.safetensors")


def test_a_dry_run_shows_sizes_and_writes_nothing(get, tmp_path, hub, capsys):
    get("wan_2.1_vae.safetensors")
    before = files_in(tmp_path)
    capsys.readouterr()
    assert get(dry_run=True) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [("complete" in row, "missing" in row) for row in rows[:3]] == [(False, True), (False, True), (True, False)]
    assert "0.01 GB to download" in rows[-1] and files_in(tmp_path) == before


@pytest.mark.parametrize("name", ["../models", "/etc/passwd", "wan3", "..", "workflows/../../x"])
def test_unknown_names_are_refused(get, name):
    with pytest.raises(ValueError, match="is not known"):
        get(name)


def test_a_file_that_is_no_workflow_is_refused(get, tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"1": "unknown.safetensors"}')
    with pytest.raises(ValueError, match="not JSON"):
        get(str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="names no published file"):
        get(str(tmp_path / "b.json"))


def test_comfyuis_folder_is_found_or_named(tmp_path, monkeypatch):
    from argparse import Namespace

    from ascend_runtime.commands.downloading.options import models_folder

    place = tmp_path / "ComfyUI"
    for folder in ("models", "comfy"):
        (place / folder).mkdir(parents=True)
    (place / "main.py").touch()
    assert models_folder(Namespace(models=None, comfyui=place)) == place / "models"
    monkeypatch.setenv("COMFYUI_DIR", str(place))
    assert models_folder(Namespace(models=None, comfyui=None)) == place / "models"
    monkeypatch.delenv("COMFYUI_DIR")
    monkeypatch.chdir(tmp_path)
    for arguments in ({"models": None, "comfyui": None}, {"models": None, "comfyui": tmp_path},
                      {"models": tmp_path / "none", "comfyui": None}):  # fmt: skip
        with pytest.raises(ValueError, match="--models|--comfyui"):
            models_folder(Namespace(**arguments))


# What the table, the workflows and the documents say.

def links(workflow: Path) -> set:
    nodes = json.loads(workflow.read_text())["nodes"]
    return {(model["name"], model["directory"], model["url"]) for node in nodes
            for model in node["properties"].get("models", ())}  # fmt: skip


@pytest.mark.parametrize("short, shown", templates.SHOWN.items())
def test_the_command_gets_what_a_workflow_links_to(short, shown):
    linked = links(ROOT / "workflows" / f"{shown}.json")
    if not linked:
        assert "tiny" in short
        return
    for name in (short, shown, str(ROOT / "workflows" / f"{shown}.json")):
        files = wanted_files([name])
        assert {(file.name, file.folder, file.address("huggingface")) for file in files} == linked, name


def test_each_published_model_can_be_downloaded_and_names_are_clear():
    names = published_files()
    assert {name for family in families().values() for name in family.published} <= set(names)
    assert len({name.lower() for name in names}) == len(names) >= 15
    for name, files in names.items():
        assert {file.folder for file in files} >= {"diffusion_models", "text_encoders", "vae"}, name
        assert wanted_files([name.upper(), name.lower()]) == list(files)
    every = {file for files in names.values() for file in files}
    assert len({file.name for file in every}) == len(every)  # a name means one file


def test_modelscope_has_addresses_of_the_same_form():
    (file,) = wanted_files(["wan2.2_vae.safetensors"])
    assert file.address("modelscope") == ("https://modelscope.cn/models/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/"
                                          "master/split_files/vae/wan2.2_vae.safetensors")  # fmt: skip


def test_the_document_lists_all_that_can_be_downloaded():
    text = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| \d", text, re.MULTILINE)
    assert sorted(rows) == sorted(name.lower() for name in published_files())
