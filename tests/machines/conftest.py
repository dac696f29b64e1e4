"""Two hosts, their ranks and a client, for all tests of this folder: they take seconds to start."""

import cluster_ranks
import hosts
import pytest

DELAY = 0.02  # seconds each way


class Pair:
    """Two hosts with the same number of ranks, and a client on the first.

    With one rank each, torchrun is started as docs/machines.md says, and the second host reaches the client through a
    process on a third, which delays and records. With more, SLURM's script starts them.
    """

    def __init__(self, ranks_of_each, folder):
        self.all = hosts.Hosts(3)
        self.hosts, self.between = self.all[:2], self.all[2]
        kind = cluster_ranks.ClusterRanks if ranks_of_each == 1 else cluster_ranks.SlurmRanks
        self.ranks = kind(self.hosts, ranks_of_each, folder)
        self.recorded = folder / "recorded"
        self.recorded.mkdir()
        if ranks_of_each == 1:
            port = cluster_ranks.PORT
            self.between.slow_link(port, self.ranks.cluster.listen, DELAY, self.recorded)
            self.ranks.clients[self.hosts[1]] = f"{self.between.address}:{port}"
        self.ranks.__enter__()
        self.client = self.ranks.client()

    def close(self):
        self.client.stop()
        self.ranks.stop()
        self.all.close()


@pytest.fixture(scope="session")
def pairs(request, tmp_path_factory):
    """`pairs(n)`: the pair of hosts with n ranks each, with its client's group ready. All pairs that the tests of this
    run use start together."""
    hosts.require()
    made = {}
    try:
        for number in sorted({ranks_of_each(item) for item in request.session.items if uses_pairs(item)}):
            made[number] = Pair(number, tmp_path_factory.mktemp("two_hosts"))

        def pair(number):
            made[number].client.start()
            return made[number]

        yield pair
    finally:
        while made:
            made.popitem()[1].close()


@pytest.fixture(scope="session", autouse=True)
def started_early(request):
    """Pairs start while the first tests run, which need none."""
    if any(map(uses_pairs, request.session.items)):
        request.getfixturevalue("pairs")


def uses_pairs(item):
    return "pairs" in item.fixturenames


def ranks_of_each(item):
    return item.callspec.params.get("ranks_of_each", 1) if hasattr(item, "callspec") else 1


def pytest_collection_modifyitems(items):
    """Tests of hosts only come first, and those with two ranks on each host last: so pairs have time to start."""
    items.sort(key=lambda item: 0 if item.path.name == "test_hosts.py" else ranks_of_each(item))
