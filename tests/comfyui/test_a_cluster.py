"""A cluster in a real ComfyUI: chosen by its name, refused with the reason, and used for a video that shows no key.

The first file of its folder, as a cluster's job ends ranks of this machine, which then have to start once more.
"""

import json
import os

import comfy_graphs as graphs
import pytest
import torch
from benchmarks.opens import Opened
from comfy_listener import Listener
from local_cluster import MACHINE, LocalCluster
from rank_processes import ranks_of
from scripts.lib.comfy_server import ComfyServer, PromptFailed

NAME = "this_host"


@pytest.fixture(scope="module")
def cluster(comfyui, request):
    """Its ranks start while the first tests run. One rank costs CI less."""
    made = LocalCluster(comfyui.base / "clusters", NAME, ranks=2 if request.config.getoption("--all-machines") else 1)
    try:
        made.start(os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
        yield made
    finally:
        made.stop()


@pytest.fixture
def listener(comfyui):
    with Listener(comfyui) as listening:
        yield listening


def on(name, make=graphs.latent, ranks=0, **changes):
    """A graph whose ranks are a cluster's."""
    graph = make(ranks=ranks, **changes)
    graph[graphs.PARALLEL]["inputs"]["cluster"] = name
    return graph


# Choosing


def test_the_page_lists_the_clusters_that_are_there_now(comfyui, cluster):
    def options():
        node = comfyui.get("/object_info/AscendParallelConfig")["AscendParallelConfig"]
        _, more = node["input"]["optional"]["cluster"]
        return more["options"], more["default"]

    assert options() == (["this machine", NAME], "this machine")
    (cluster.folder / "another.json").write_text("{}")
    try:
        assert options()[0] == ["this machine", "another", NAME]
    finally:
        (cluster.folder / "another.json").unlink()


def test_a_cluster_that_is_not_there_is_refused_with_those_that_are(comfyui, cluster):
    text = graphs.refusal(comfyui, on("atlas"), graphs.PARALLEL)
    assert "AV-1901: There is no cluster 'atlas' on this host" in text and "docs/errors.md" in text
    assert f"are: {NAME}." in text and '"this machine"' in text
    assert "give 1 to 64 letters" in graphs.refusal(comfyui, on("../x"), graphs.PARALLEL)
    assert "There is no cluster '5'" in graphs.refusal(comfyui, on(5), graphs.PARALLEL)


def test_another_number_of_ranks_is_refused(comfyui, cluster):
    text = graphs.refusal(comfyui, on(NAME, ranks=4), graphs.PARALLEL)
    assert f"AV-1904: ranks is 4, but the cluster '{NAME}' has {cluster.ranks}," in text
    assert "Set ranks to 0 (auto)" in text


def test_a_file_that_cannot_be_used_is_refused_by_its_field(comfyui, cluster):
    cluster.write(rank=2)
    try:
        text = graphs.refusal(comfyui, on(NAME), graphs.PARALLEL)
        assert f"{NAME}.json: there is no field 'rank'; the fields are listen, key, ranks, paths." in text
    finally:
        cluster.write()


def test_a_key_that_others_can_read_is_refused_when_the_job_begins(comfyui, cluster):
    cluster.key.chmod(0o644)
    try:
        with pytest.raises(PromptFailed, match="AV-1902: .*others can read or write it; run: chmod 600"):
            comfyui.wait(comfyui.queue(on(NAME, seed=30)))
    finally:
        cluster.key.chmod(0o600)


def test_a_job_that_waits_for_ranks_shows_how_many_have_joined_and_can_be_cancelled(comfyui, cluster, listener):
    nobody = LocalCluster(cluster.folder, "nobody", ranks=16)
    run = listener.queue(on(nobody.name, seed=37))
    said = "0 of 16 ranks have joined; waiting for the machines of the cluster 'nobody'"
    run.wait_for(lambda _: any(said in event.data["text"] for event in listener.events if event.kind == "text"))
    assert said in comfyui.log
    comfyui.post("/interrupt")
    assert run.end().kind == "execution_interrupted"
    nobody.remove()


# Using


def test_a_video_by_a_cluster_shows_who_made_it_and_no_key(comfyui, cluster, listener):
    run = listener.run(on(NAME, graphs.video, seed=31), timeout=240)
    print([event.data["text"] for event in listener.events if event.kind == "text"])
    file = graphs.saved(comfyui, run.prompt_id)
    own = ranks_of(comfyui.process.pid)
    assert len(cluster.pids) == cluster.ranks and not set(cluster.pids.values()) & set(own.values())
    history = json.dumps(comfyui.history(run.prompt_id), ensure_ascii=False)
    assert f"The ranks were on these machines: {MACHINE}." in history
    assert f"参与计算的机器：{MACHINE}。" in history
    assert f"rank(s) on cpu, machine {MACHINE}: " in comfyui.log
    for text in (history, file.read_bytes().decode("latin-1")):
        assert NAME in text and cluster.address not in text and cluster.key.name not in text
        assert not [line for line in cluster.secrets if line in text]
    assert MACHINE not in file.read_bytes().decode("latin-1")
    assert not [line for line in cluster.secrets if line in comfyui.log + cluster.log.read_text()]
    assert listener.run(on(NAME, graphs.video, seed=31)).cached() >= {graphs.SAMPLER}


def test_the_ranks_stay_while_this_machine_makes_the_same_latent(comfyui, cluster, listener, request):
    if not request.config.getoption("--all-machines"):
        pytest.skip("--all-machines runs it")
    made = graphs.saved_latent(comfyui, listener.run(on(NAME, seed=32)).prompt_id)
    before = cluster.pids
    own = graphs.saved_latent(comfyui, listener.run(graphs.latent(seed=32)).prompt_id)
    assert (own - made).abs().max() <= 1e-4 and made.std() > 0.1
    listener.run(on(NAME, seed=33))
    assert cluster.pids == before and before


def test_free_memory_lets_go_of_the_ranks_which_free_their_weights(comfyui, cluster, listener, checkpoint):
    listener.run(on(NAME, seed=34))
    before = cluster.pids
    listener.run({"1": {"class_type": "AscendFreeMemory", "inputs": {"what": "ranks"}}})
    with Opened(checkpoint.rglob("*.safetensors")) as opened:
        listener.run(on(NAME, seed=35))
    assert "transformer" in {file.parent.name for file in opened.files()}
    assert cluster.pids == before


def test_a_graph_that_says_nothing_of_a_cluster_has_ranks_of_this_machine(comfyui, cluster, listener):
    """Also one that was saved before there were clusters. The next tests find these ranks."""
    graph = graphs.latent(seed=36)
    assert "cluster" not in graph[graphs.PARALLEL]["inputs"]
    listener.run(graph)
    assert len(ranks_of(comfyui.process.pid)) == 2


def test_a_comfyui_that_is_killed_and_started_again_takes_the_ranks_again(tmp_path, checkpoint, request):
    if not request.config.getoption("--all-machines"):
        pytest.skip("--all-machines runs it")
    folders = tmp_path / "models" / "diffusers"
    folders.mkdir(parents=True)
    (folders / graphs.RANDOM).symlink_to(checkpoint)
    cluster = LocalCluster(tmp_path / "clusters", NAME)
    server = ComfyServer(base=tmp_path, env={"ASCEND_RUNTIME_CLUSTERS": str(cluster.folder)})
    try:
        cluster.start(os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
        with server, Listener(server) as listener:
            first = graphs.saved_latent(server, listener.run(on(NAME, seed=1), timeout=240).prompt_id)
            before = cluster.pids
            run = listener.queue(on(NAME, seed=2, steps=1000, length=17))
            run.wait_for_step(graphs.SAMPLER, 2)
            server.process.kill()
        with server, Listener(server) as listener:
            again = graphs.saved_latent(server, listener.run(on(NAME, seed=1), timeout=240).prompt_id)
        assert torch.equal(first, again) and cluster.pids == before
    finally:
        server.stop()
        cluster.stop()
