"""Runs the contract tests: pytest in .venv-contract, over stub CANN libraries. Arguments go to pytest.

The Python of an environment with another torch_npu, .venv-contract-VERSION, runs them there.

The dynamic linker reads its search path when a process starts, so pytest must be started with it.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(HERE), str(ROOT)]

import cann  # noqa: E402
from ascend_runtime.hardware import host  # noqa: E402
from scripts.lib import contract  # noqa: E402


def main(arguments):
    if not Path(sys.prefix).name.startswith(contract.FOLDER.name):
        if problem := contract.why_not():
            sys.exit(f"error: the contract tests cannot run: {problem}")
        os.execv(contract.PYTHON, [str(contract.PYTHON), __file__, *arguments])
    if fault := host.mindiesd_fault():
        sys.exit(f"error: the contract tests cannot run: {fault}")
    variables = {**os.environ, **cann.variables(cann.build()), "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-o", "cache_dir=.cache/pytest-contract", *arguments]
    if not any("tests/contract" in argument for argument in arguments):
        command.append("tests/contract")
    os.chdir(ROOT)
    os.execve(sys.executable, command, variables)


if __name__ == "__main__":
    main(sys.argv[1:])
