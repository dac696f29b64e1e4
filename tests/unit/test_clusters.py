"""Clusters: their files are read strictly, and made by a command that asks nothing and shows no key."""

import json
import os

import pytest
from ascend_runtime.specs.cluster import (
    FOLDER_VARIABLE,
    Cluster,
    address_of,
    cluster_names,
    folder_of_clusters,
    read_cluster,
)

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
    ("0.0.0.0:4", ("0.0.0.0", 4), "every interface"), ("[::]:5", ("::", 5), "every interface"),
])  # fmt: skip
def test_an_address_is_taken_as_written_and_an_open_one_is_known(listen, address, risk):
    cluster = Cluster(name="x", listen=listen, key="/k", ranks=1)
    assert cluster.address == address_of(listen) == address
    assert cluster.risk is None if risk is None else risk in cluster.risk
