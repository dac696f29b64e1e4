"""The environment of the contract tests (tests/contract): .venv with the real torch_npu and mindiesd.

Importing them needs CANN, and breaks `import torch` without it. So they are in .venv-contract, on top of .venv, and the
tests provide stub libraries. Standard library only. As a command, it makes the environment, or prints why it cannot.
"""

import shutil
from pathlib import Path

from .environment import REPOSITORY, Environment, SetupError, inspect, lock, requirement_lines, say

UNDERNEATH = REPOSITORY / ".venv" / "bin" / "python"
FOLDER = REPOSITORY / ".venv-contract"
PYTHON = FOLDER / "bin" / "python"
RUN = REPOSITORY / "tests" / "contract" / "run.py"
TOOLS = ("gcc", "nm")


def why_not():
    """Why the contract tests cannot run here; None if they can."""
    return _obstacle() or _absence()


def make():
    """Makes .venv-contract, which is fast if it exists already; prints a message if it cannot."""
    problem = _obstacle()
    if not problem:
        host = inspect(UNDERNEATH)
        environment = Environment(FOLDER, host)
        try:
            with lock():
                environment.make(base=UNDERNEATH)
                environment.install("a contract test", _requirements(host["torch"]), "--no-deps")
        except SetupError as error:
            problem = str(error)
    if problem:
        say(f"the contract tests will be skipped: {problem}")


def _obstacle():
    """Why the environment cannot be made; None if it can."""
    if inspect(UNDERNEATH)["npu"]:
        return "this Python has its own torch_npu, which must not load stub libraries"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"there is no {' and no '.join(missing)} to make stubs with (Debian, Ubuntu: apt-get install gcc)"
    return None


def _absence():
    """Why the environment is not there; None if it is."""
    if not PYTHON.exists():
        return f"there is no {FOLDER.name}; bash scripts/test.sh makes it"
    if not all(any(Path(path, name).is_dir() for path in inspect(PYTHON)["packages"])
               for name in ("torch_npu", "mindiesd")):  # fmt: skip
        return f"torch_npu and mindiesd could not be installed in {FOLDER.name}; bash scripts/test.sh shows why"
    return None


def _requirements(torch):
    """requirements-contract.txt, with the torch_npu for this version of torch."""
    minor = ".".join(torch.split(".")[:2])
    lines = requirement_lines(REPOSITORY / "requirements-contract.txt")
    fitting = (line.startswith(f"torch_npu=={minor}.") or not line.startswith("torch_npu") for line in lines)
    return [line if fits else f"torch_npu=={minor}.*" for line, fits in zip(lines, fitting)]


if __name__ == "__main__":
    make()
