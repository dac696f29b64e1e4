"""The environment of the contract tests (tests/contract): .venv with the real torch_npu and mindiesd.

Importing them needs CANN, and breaks `import torch` without it. So they are in .venv-contract, on top of .venv, and the
tests provide stub libraries. Standard library only. As a command, it makes the environment, or prints why it cannot.

As a command with a version of torch_npu, such as 2.9.0.post6, it makes .venv-contract-VERSION with that version and its
torch, and runs the tests there; further arguments go to pytest. PyPI's torch for x86_64 is a CUDA build of several GB.
"""

import os
import re
import shutil
import sys
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


def make_other(torch_npu):
    """Makes .venv-contract-VERSION with this version of torch_npu and its torch, and returns its Python.

    Raises SetupError if it cannot.
    """
    if problem := _obstacle():
        raise SetupError(f"the contract tests cannot run: {problem}")
    torch = re.match(r"[0-9]+\.[0-9]+\.[0-9]+", torch_npu)
    if not torch:
        raise SetupError(f"torch_npu is {torch_npu!r}; it must be a whole version, such as 2.9.0 or 2.9.0.post6")
    environment = Environment(FOLDER.with_name(f"{FOLDER.name}-{torch_npu}"), inspect(UNDERNEATH))
    with lock():
        environment.make(base=UNDERNEATH)
        environment.replace_torch(torch[0])
        environment.install("a contract test", _requirements(torch[0], torch_npu), "--no-deps")
    return environment.python


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


def _requirements(torch, torch_npu=None):
    """requirements-contract.txt with this torch_npu, by default the one for this version of torch."""
    lines = requirement_lines(REPOSITORY / "requirements-contract.txt")
    named = next(line for line in lines if line.startswith("torch_npu"))
    minor = ".".join(torch.split(".")[:2])
    if torch_npu is None and not named.startswith(f"torch_npu=={minor}."):
        torch_npu = f"{minor}.*"
    return [f"torch_npu=={torch_npu}" if torch_npu and line == named else line for line in lines]


def main(torch_npu=None, *arguments):
    if torch_npu is None:
        make()
        return
    try:
        python = make_other(torch_npu)
    except SetupError as error:
        sys.exit(f"error: {error}")
    os.execv(python, [str(python), str(RUN), *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
