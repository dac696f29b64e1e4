"""Clusters: their files are read strictly, and made by a command that asks nothing and shows no key."""

import json
import os
import shlex
import stat
import sys

import pytest
from ascend_runtime import __main__
from ascend_runtime.commands.cluster import command
from ascend_runtime.specs.cluster import (
    FOLDER_VARIABLE,
    Cluster,
    address_of,
    cluster_names,
    folder_of_clusters,
    read_cluster,
)
from ascend_runtime.wire import tls

GOOD = {"listen": "127.0.0.1:29600", "key": "atlas.key", "ranks": 16}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of clusters of this test."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "clusters"))
    (tmp_path / "clusters").mkdir()
    return tmp_path / "clusters"


def write(folder, name="atlas", content=None, **changes):
    text = json.dumps(GOOD | changes) if content is None else content
    (folder / f"{name}.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def refused(name="atlas") -> str:
    with pytest.raises(ValueError) as caught:
        read_cluster(name)
    assert str(caught.value).startswith("AV-1901: ") and "\n" not in str(caught.value)
    return str(caught.value)


# Reading


def test_a_clusters_file_is_read_and_its_key_is_next_to_it(folder):
    paths = {"atlas2": {"/data/models/": "/mnt//models"}}
    write(folder, paths=paths)
    found = read_cluster("atlas")
    assert found == Cluster(name="atlas", listen="127.0.0.1:29600", key=str(folder / "atlas.key"), ranks=16,
                            paths={"atlas2": {"/data/models": "/mnt/models"}})  # fmt: skip
    assert found.address == ("127.0.0.1", 29600)
    write(folder, key="/etc/keys/../atlas.key")
    assert read_cluster("atlas").key == "/etc/atlas.key"


def test_its_text_is_its_name_only(folder):
    write(folder)
    found = read_cluster("atlas")
    assert str(found) == f"{found}" == repr(found) == "Cluster('atlas')"


@pytest.mark.parametrize("content, says", [
    ("", "it is not JSON"), (b"\xff{}", "it is not JSON"), ("[" * 20_000, "it is not JSON"),
    ("[]", "it is not a JSON object with the fields listen, key, ranks, paths."),
    ("x" * 70_000, "it has more than 65536 bytes"),
    (json.dumps(GOOD | {"port": 1}), "there is no field 'port'; the fields are listen, key, ranks, paths."),
    (json.dumps(GOOD | {"name": "atlas"}), "there is no field 'name'"),
    (json.dumps({"listen": "127.0.0.1:1", "ranks": 2}), "the field 'key' is missing; a cluster has listen, key, ranks"),
])  # fmt: skip
def test_a_file_that_is_no_clusters_is_refused_by_what_is_wrong(folder, content, says):
    write(folder, content=content)
    assert says in refused() and str(folder / "atlas.json") in refused()


@pytest.mark.parametrize("changes, says", [
    ({"ranks": 0}, "ranks is 0; it must be between 1 and 1024"),
    ({"ranks": "16"}, "ranks is '16'. Expected `int`, got `str`."),
    ({"ranks": True}, "ranks is True"),
    ({"listen": 29600}, "listen is 29600. Expected `str`, got `int`."),
    ({"listen": "atlas1"}, "listen is 'atlas1'; give HOST:PORT, such as 192.168.10.1:29600"),
    ({"listen": ":29600"}, "give HOST:PORT"), ({"listen": "atlas1:0"}, "from 1 to 65535"),
    ({"listen": "atlas1:65536"}, "from 1 to 65535"), ({"listen": "fd00::1:29600"}, "[fd00::1]:29600"),
    ({"listen": "http://atlas1:29600"}, "give HOST:PORT"), ({"listen": "$(id):1"}, "give HOST:PORT"),
    ({"key": None}, "key is None"), ({"key": "a\0b"}, "key is "), ({"key": "k" * 5000}, "give an absolute path"),
    ({"paths": []}, "paths is []. Expected `object`, got `array`."),
    ({"paths": {"a b": {}}}, "The name of a machine in paths is 'a b'"),
    ({"paths": {"atlas2": {"models": "/x"}}}, "A folder of paths of atlas2 is 'models'; give an absolute path"),
    ({"paths": {"atlas2": {"/x": "~/models"}}}, "A folder of paths of atlas2 is '~/models'"),
    ({"paths": {"atlas2": {"/x": 1}}}, "paths is "),
])  # fmt: skip
def test_a_field_with_a_wrong_value_is_named_with_what_it_can_be(folder, changes, says):
    write(folder, **changes)
    assert says in refused()


def test_a_name_that_has_no_file_is_refused_with_those_that_have(folder):
    assert "There is no cluster 'atlas' on this host" in refused() and "are: none." in refused()
    for name in ("b", "a", "this machine", ".hidden"):
        write(folder, name)
    assert cluster_names() == ["a", "b"] and "are: a, b." in refused()
    for name in ("../atlas", "", "a/b", "x" * 65, "a\n", "\x1b[2J"):
        assert "give 1 to 64 letters" in refused(name) and "\x1b" not in refused(name)


def test_what_is_not_a_file_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "pipe.json")
    (folder / "other.json").mkdir()
    assert "is not a file" in refused("pipe") and "is not a file" in refused("other")


def test_without_the_variable_clusters_are_in_the_users_home(tmp_path):
    assert folder_of_clusters({"HOME": "/home/x"}).as_posix() == "/home/x/.config/ascend-video/clusters"
    assert cluster_names({"HOME": str(tmp_path)}) == []


@pytest.mark.parametrize("listen, address, risk", [
    ("127.0.0.1:1", ("127.0.0.1", 1), None), ("[fd00::1]:65535", ("fd00::1", 65535), None),
    ("[fe80::1%eth0]:2", ("fe80::1%eth0", 2), None), ("atlas-1.local:29600", ("atlas-1.local", 29600), None),
    ("192.168.10.1:29600", ("192.168.10.1", 29600), None), ("8.8.8.8:3", ("8.8.8.8", 3), "of the public internet"),
    ("0:4", ("0", 4), "every interface"),
    ("0.0.0.0:4", ("0.0.0.0", 4), "every interface"), ("[::]:5", ("::", 5), "every interface"),
])  # fmt: skip
def test_an_address_is_taken_as_written_and_an_open_one_is_known(listen, address, risk):
    cluster = Cluster(name="x", listen=listen, key="/k", ranks=1)
    assert cluster.address == address_of(listen) == address
    assert cluster.risk is None if risk is None else risk in cluster.risk


# The command


def run(*arguments) -> int:
    """The exit status of `cluster` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ascend-video", "cluster", *arguments])
        return __main__.main()


NEW = ("new", "atlas", "--listen", "127.0.0.1:29600", "--ranks", "16")


def test_new_makes_a_cluster_for_this_user_only(folder, capsys):
    folder.rmdir()
    assert run(*NEW) == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert modes == {"clusters": 0o700, "atlas.json": 0o600, "atlas.key": 0o600}
    found = read_cluster("atlas")
    assert found == Cluster(name="atlas", listen="127.0.0.1:29600", key=str(folder / "atlas.key"), ranks=16)
    tls.read_key(found.key)
    assert json.loads((folder / "atlas.json").read_text()) == GOOD  # the folder can be moved
    said = capsys.readouterr()
    lines = [line for line in (folder / "atlas.key").read_text().splitlines() if line]
    assert lines and not [line for line in lines if line in said.out + said.err]
    assert run("show", "atlas") == 0 and capsys.readouterr().out == said.out


def test_what_is_printed_can_be_run_on_each_machine(folder, capsys):
    assert run(*NEW, "--machines", "4") == 0
    said = capsys.readouterr().out
    assert f"scp -p {folder / 'atlas.key'} MACHINE:.config/ascend-video/clusters/atlas.key" in said
    first, other = (shlex.split("torchrun" + text.split("\n\n")[0]) for text in said.split("torchrun")[1:])
    assert first[:5] == ["torchrun", "--nnodes", "4", "--nproc-per-node", "4"]
    assert first[first.index("--rdzv-endpoint") + 1] == "127.0.0.1:29500"
    assert first[-6:] == ["-m", "ascend_runtime.engine.worker", "--client", "127.0.0.1:29600", "--key",
                          str(folder / "atlas.key")]  # fmt: skip
    changed = [pair for pair in zip(first, other, strict=True) if pair[0] != pair[1]]
    assert changed == [("is_host=1", "is_host=0"), ("127.0.0.1", "ADDRESS"),
                       (first[-1], "~/.config/ascend-video/clusters/atlas.key")]  # fmt: skip


def test_an_open_address_is_warned_of_and_not_given_to_the_machines(folder, capsys):
    assert run("new", "any", "--listen", "0.0.0.0:29500", "--ranks", "2") == 0
    said = capsys.readouterr()
    assert "warning: 0.0.0.0 is every interface of this host" in said.err
    assert "--client HOST:29500" in said.out and "--rdzv-endpoint HOST:29501" in said.out


@pytest.mark.parametrize("arguments, says", [
    (NEW, "atlas.json exists. Give another name, or delete it."),
    (("new", "b", *NEW[2:]), "b.key exists. Give another name, or delete it."),
    (("new", "../c", *NEW[2:]), "AV-1901: The name of the cluster is '../c'"),
    (("new", "c", "--listen", "atlas1", "--ranks", "2"), "listen is 'atlas1'; give HOST:PORT"),
    (("new", "c", "--listen", "127.0.0.1:1", "--ranks", "0"), "ranks is 0"),
    ((*NEW[:1], "c", *NEW[2:], "--machines", "3"), "16 ranks cannot be divided among them equally"),
    ((*NEW[:1], "c", *NEW[2:], "--machines", "0"), "--machines is 0; it must be between 1 and 1024"),
    (("show", "c"), "AV-1901: There is no cluster 'c' on this host"),
])  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_overwritten(folder, capsys, arguments, says):
    write(folder)
    (folder / "b.key").write_text("mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run(*arguments) == 2
    assert says in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_appears_meanwhile_is_not_overwritten(folder):
    cluster = Cluster(name="atlas", listen="127.0.0.1:1", key=str(folder / "atlas.key"), ranks=2)
    write(folder)
    with pytest.raises(ValueError, match="AV-1901: .*atlas.json exists"):
        command.made(cluster)
    assert os.listdir(folder) == ["atlas.json"]


def test_list_shows_each_cluster_or_why_it_cannot_be_used(folder, capsys):
    assert run("list") == 0 and "`python -m ascend_runtime cluster new` makes one" in capsys.readouterr().err
    write(folder)
    write(folder, "broken", content="{")
    assert run("list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "atlas: 16 ranks, 127.0.0.1:29600"
    assert second.startswith(f"broken: AV-1901: {folder / 'broken.json'}: it is not JSON")
