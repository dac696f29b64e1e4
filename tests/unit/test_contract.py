"""The contract tests (tests/contract), as two tests: they run in an environment of their own, .venv-contract.

Each half takes about as long as the other; two workers can take one each (tests/conftest.py).
"""

import re
import subprocess

from scripts.lib import contract
import pytest

FOLDER = "tests/contract"
STARTING = [f"{FOLDER}/test_{name}.py" for name in ("benchmark", "cann", "components", "launcher", "pipeline")]
HALVES = {"which start processes": STARTING, "of one process": [FOLDER, *(f"--ignore={file}" for file in STARTING)]}


@pytest.mark.parametrize("half", HALVES)
def test_calls_fit_the_real_torch_npu_and_mindiesd(capfd, half):
    problem = contract.why_not()
    if problem:
        pytest.skip(problem)
    done = subprocess.run([contract.PYTHON, contract.RUN, "-rs", *HALVES[half]], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=580)  # fmt: skip
    *lines, summary = done.stdout.strip().splitlines()
    with capfd.disabled():
        skipped = (line for line in lines if line.startswith("SKIPPED"))
        print("", *skipped, f"contract, tests {half}: {summary.strip(' =')} ", sep="\n")
    if done.returncode or not re.search(r"[1-9]\d* passed", summary):
        pytest.fail(done.stdout, pytrace=False)


@pytest.mark.parametrize("torch, torch_npu", [
    ("2.13.0+cpu", "torch_npu==2.13.0"),
    ("2.13.1", "torch_npu==2.13.0"),
    ("2.9.1+cu128", "torch_npu==2.9.*"),
])  # fmt: skip
def test_torch_npu_is_the_one_for_this_torch(torch, torch_npu):
    assert contract._requirements(torch) == [torch_npu, "mindiesd==3.1.0", "pyyaml"]


def test_another_torch_npu_is_taken_whole():
    """As `scripts/test.sh --torch-npu` has it."""
    assert contract._requirements("2.9.0", "2.9.0.post6")[0] == "torch_npu==2.9.0.post6"
    assert contract._requirements("2.13.0", "2.13.0.post1")[0] == "torch_npu==2.13.0.post1"
    with pytest.raises(contract.SetupError, match="torch_npu is '2.9'; it must be a whole version, such as 2.9.0"):
        contract.make_other("2.9")


def test_each_contract_test_is_in_one_half():
    """The second half is all but the first, so that a new file is in it."""
    everything = {str(file.relative_to(contract.REPOSITORY)) for file in contract.RUN.parent.glob("test_*.py")}
    assert set(STARTING) < everything and len(everything) > 10


def test_why_not_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(contract, "inspect", lambda python: {"npu": python == contract.PYTHON, "packages": []})
    monkeypatch.setattr(contract, "PYTHON", tmp_path / "python")
    assert "bash scripts/test.sh makes it" in contract.why_not()
    contract.PYTHON.touch()
    assert "could not be installed" in contract.why_not()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no gcc and no nm" in contract.why_not()
    monkeypatch.setattr(contract, "inspect", lambda python: {"npu": True})
    assert "its own torch_npu" in contract.why_not()
