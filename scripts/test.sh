#!/usr/bin/env bash
# Makes the environments (.venv, a ComfyUI in .cache/comfyui, .venv-contract) and runs all tests; arguments go to pytest.
# Those of tests/contract run in .venv-contract: as one test of the others, or alone where they are named.
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
exec .venv/bin/python -m pytest -rs "$@"
