"""Runs a module of this package, whatever the current folder: `python scripts/lib MODULE [ARGUMENT ...]`."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    module = sys.argv.pop(1)
    runpy.run_module(f"scripts.lib.{module}", run_name="__main__", alter_sys=True)
