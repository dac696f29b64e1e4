#!/usr/bin/env bash
# Makes the environments (.venv, .venv-contract, a ComfyUI in .cache/comfyui) and runs all tests.
# Arguments go to pytest. The contract tests are one test of the others; `test.sh tests/contract ...` runs them alone.
#   PYTHON=...       the Python 3.10 - 3.12 to make .venv from
#   COMFYUI_DIR=...  test against this ComfyUI instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/python.sh
"$PYTHON" scripts/lib/comfyui.py
"$PYTHON" scripts/lib/contract.py
case " $*" in
*" tests/contract"*) exec .venv/bin/python tests/contract/run.py "$@" ;;
esac
# Two workers, as tests/conftest.py shares the files out.
exec .venv/bin/python -m pytest -rs -n 2 --no-loadscope-reorder "$@"
