"""The environment of the tests with an older transformers: .venv-transformers, over .venv.

It has what requirements.txt installs into a ComfyUI's Python with this transformers: the newest compatible versions of
the other packages. Standard library only. As a command with a version, it makes the environment and runs the tests;
further arguments go to pytest, instead of the tests below.
"""

import os
import sys

from .environment import REPOSITORY, Environment, inspect, lock, requirement_lines

UNDERNEATH = REPOSITORY / ".venv" / "bin" / "python"
FOLDER = REPOSITORY / ".venv-transformers"
PYTHON = FOLDER / "bin" / "python"
# The tests that depend on transformers: tokenizers and text encoders, conversions and comparisons with its classes, and
# text encoding in a ComfyUI, whose own encoders use it too.
TESTS = ("models/test_transformers", "files/test_text_encoder_formats", "ranks/test_known_prompts",
         "files/test_inspection", "files/test_conversion", "files/test_unusable_files", "ranks/test_parity",
         "comfyui/test_formats")  # fmt: skip


def make(version):
    """Makes .venv-transformers with this version, such as 4.57, or changes it to that."""
    environment = Environment(FOLDER, inspect(UNDERNEATH))
    with lock():
        environment.make(base=UNDERNEATH)
        requirements = requirement_lines(REPOSITORY / "requirements.txt")
        environment.install("an older transformers", [f"transformers=={version}.*", *requirements])


def main(version, *arguments):
    make(version)
    chosen = arguments or [f"tests/{name}.py" for name in TESTS]
    os.chdir(REPOSITORY)
    os.execv(PYTHON, [str(PYTHON), "-m", "pytest", "-rs", "-o", "cache_dir=.cache/pytest-transformers", *chosen])


if __name__ == "__main__":
    main(*sys.argv[1:])
