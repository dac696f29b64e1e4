"""The contract tests (tests/contract), as one test: they run in an environment of their own, .venv-contract."""

import re
import subprocess

import contract
import pytest


def test_calls_fit_the_real_torch_npu_and_mindiesd(capfd):
    problem = contract.why_not()
    if problem:
        pytest.skip(problem)
    done = subprocess.run([contract.PYTHON, contract.RUN, "-rs"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=580)  # fmt: skip
    *_, summary = done.stdout.strip().splitlines()
    with capfd.disabled():
        print(f" contract: {summary.strip(' =')} ", end="", flush=True)
    if done.returncode or not re.search(r"[1-9]\d* passed", summary):
        pytest.fail(done.stdout, pytrace=False)
