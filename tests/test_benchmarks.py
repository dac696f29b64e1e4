"""The benchmarks run, and write the figures that they promise; what the figures are is not tested here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.opens import Opened

ROOT = Path(__file__).resolve().parent.parent
TRANSPORT = ["transport.null_ms", "transport.request_ms", "transport.frames_s"]
PEERS = ["socket", "ray"]
NAMES = {
    "transport": {*TRANSPORT, *(f"{name}_vs_{peer}" for name in TRANSPORT for peer in PEERS)},
    "warm": {"warm.cold_start_s", "warm.late_over_early", "warm.rss_slope_mb", "warm.weight_opens"},
}


@pytest.mark.parametrize("name", NAMES)
def test_writes_its_figures(name, tmp_path):
    file = tmp_path / "figures.jsonl"
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["name"] for row in rows} == NAMES[name] and len(rows) == len(NAMES[name])
    for row in rows:
        assert set(row) == {"name", "value", "unit", "better", "baseline", "context"}
        assert row["better"] in ("lower", "higher") and row["name"] in done.stdout
        assert row["context"]["cores"] == len(os.sched_getaffinity(0)) and row["context"]["quick"] is True
        if row["name"] not in ("warm.rss_slope_mb", "warm.weight_opens"):
            assert row["value"] > 0, row
    opens = [row["value"] for row in rows if row["name"] == "warm.weight_opens"]
    assert opens in ([], [0]), "a warm run read weights"


def test_openings_are_seen(tmp_path):
    read, unread = tmp_path / "read", tmp_path / "unread"
    for file in (read, unread):
        file.write_bytes(b"1")
    with Opened([read, unread]) as opened:
        subprocess.run(["cat", str(read)], check=True, capture_output=True)
    assert opened.files() == [read]
    with Opened([read, unread]) as opened:
        pass
    assert opened.files() == []


def test_no_file_to_watch_is_an_error():
    with pytest.raises(ValueError, match="no file"):
        Opened([])
