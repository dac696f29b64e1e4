"""What ranks measure of the link between two hosts is what the link was made to be."""

import json
import os
import sys
from pathlib import Path

import hosts
import link_rank
import pytest

RANKS = 2  # of each host


@pytest.mark.parametrize("rate, gigabits", [("1gbit", 1.0), ("50mbit", 0.05)])
def test_the_rate_of_a_limited_link_is_measured_in_a_moment(request, tmp_path, rate, gigabits):
    """Within a factor of 3, as other programs run, and both directions share the host's cores."""
    if not request.config.getoption("--all-machines"):
        pytest.skip("needs --all-machines")
    hosts.require()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "eth0"}
    with hosts.Hosts(2) as two:
        two[1].limit(rate)
        started = []
        for rank in range(2 * RANKS):
            command = [sys.executable, Path(link_rank.__file__), f"{two[0].address}:29500", tmp_path / str(rank)]
            own = {"RANK": str(rank), "WORLD_SIZE": str(2 * RANKS)}
            started.append(two[rank // RANKS].start(command, env=environment | own))
        assert [process.wait(120) for process in started] == [0] * len(started)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2 * RANKS)]
    of_rank, of_machine, first, seconds = found[0]
    print(f"{rate}: {8e-9 / of_rank:.3f} Gbit/s of a rank, {8e-9 / of_machine:.3f} of a machine, {1e3 * first:.2f} ms "
          f"until the first byte, {seconds:.1f} s")  # fmt: skip
    assert all(one[:3] == found[0][:3] for one in found)
    assert all(gigabits / 3 < 8e-9 / byte < 1.5 * gigabits for byte in (of_machine, of_rank))
    assert seconds < 10 and first < 0.5
