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
def pairs(tmp_path_factory):
    """`pairs(n)`: the pair of hosts with n ranks each, with its client's group ready. One at a time."""
    hosts.require()
    made = {}

    def pair(ranks_of_each):
        if ranks_of_each not in made:
            while made:
                made.popitem()[1].close()
            made[ranks_of_each] = Pair(ranks_of_each, tmp_path_factory.mktemp("two_hosts"))
        made[ranks_of_each].client.start()
        return made[ranks_of_each]

    yield pair
    while made:
        made.popitem()[1].close()


def pytest_collection_modifyitems(items):
    """Tests with two ranks on each host come last, so that hosts are made once for each number."""
    items.sort(key=lambda item: getattr(item, "callspec", None) is not None
               and item.callspec.params.get("ranks_of_each") == 2)  # fmt: skip
