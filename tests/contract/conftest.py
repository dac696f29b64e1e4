"""Fixtures of the contract tests, which run in an environment of their own (see run.py) and nowhere else."""

import os
import subprocess
import sys
import textwrap

import pytest

inside = "STUB_SOC" in os.environ  # as run.py starts pytest
collect_ignore_glob = [] if inside else ["test_*.py"]


def pytest_report_header():
    return None if inside else "tests/contract is left out: bash scripts/test.sh tests/contract runs it"


@pytest.fixture(scope="session")
def python_on():
    """`python_on(soc, code, devices=1)`: what `code` prints, in a process of its own on such (fake) devices."""

    def run(soc, code, devices=1):
        environment = {**os.environ, "STUB_SOC": soc, "STUB_DEVICES": str(devices)}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=environment,
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, f"on {soc}: {done.stderr[-4000:]}"
        return done.stdout.strip()

    return run
