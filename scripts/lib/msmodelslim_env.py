"""The environment of the tests with msModelSlim: .venv with PyPI's msmodelslim, in .venv-msmodelslim over it.

msModelSlim quantizes on the CPU what these tests load. Standard library only. As a command, it makes the environment.
"""

from .environment import REPOSITORY, Environment, SetupError, inspect, lock, say

UNDERNEATH = REPOSITORY / ".venv" / "bin" / "python"
FOLDER = REPOSITORY / ".venv-msmodelslim"
PYTHON = FOLDER / "bin" / "python"
REQUIREMENTS = ["msmodelslim==26.1.0"]


def why_not():
    """Why the tests with msModelSlim cannot run here; None if they can."""
    if not PYTHON.exists():
        return f"there is no {FOLDER.name}; .venv/bin/python scripts/lib msmodelslim_env makes it"
    return None


def make():
    """Makes .venv-msmodelslim, which is fast if it exists already; prints a message if it cannot."""
    environment = Environment(FOLDER, inspect(UNDERNEATH))
    try:
        with lock():
            environment.make(base=UNDERNEATH)
            environment.install("msModelSlim", REQUIREMENTS)
    except SetupError as error:
        say(f"the tests with msModelSlim will be skipped: {error}")


if __name__ == "__main__":
    make()
